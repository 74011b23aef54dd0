"""Losses as pure functions of tensors. They return one value per token, document or pair, never a mean.

The caller sums and divides by the count over all ranks and micro-batches, so results do not depend on how a batch is split.
Shape suffixes are explained in records.py.
"""
