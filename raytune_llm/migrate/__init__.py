"""Runs of other trainers as experiments of ours."""
