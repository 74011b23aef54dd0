"""Losses as mathematics: pure functions of tensors, one value a token, a document or a pair, never a mean.

The caller sums and divides by the count over all ranks and micro-batches, so results do not depend on how a batch is split.
Shape suffixes are those of records.py, and M: documents (one sequence each) of a batch.
"""
