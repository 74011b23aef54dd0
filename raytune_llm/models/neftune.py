"""NEFTune: noise on the embeddings in training (Jain et al. 2023, arXiv 2310.05914).

Each random number depends only on the step's seed, the document and the place in it, not on a generator's state. So the noise
does not depend on packing, micro-batches, workers or the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""splitmix64's constants (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as int64."""


def neftune_noise(ids_L: Tensor, positions_L: Tensor, document_L: Tensor, *, width: int, alpha: float, seed: int) -> Tensor:
    """Uniform noise in [-1, 1) times alpha / sqrt(tokens of the document x width): float32 [L, width].

    document_L: the number of each token's document, from 0. positions_L: positions in the documents.
    """
    num_documents = len(ids_L)  # an upper bound, since counting would wait for the device
    token_L = scrambled(ids_L * GOLDEN + positions_L)
    text_L = token_L.new_zeros(num_documents).index_add_(0, document_L, token_L)[document_L]
    tokens_L = torch.zeros_like(token_L).index_add_(0, document_L, torch.ones_like(token_L))[document_L]
    start_L = scrambled(scrambled(text_L + seed) + positions_L)
    places_W = torch.arange(1, width + 1, device=ids_L.device) * GOLDEN
    bits_LW = scrambled(start_L[:, None] + places_W) >> 40  # 24 bits, as many as a float32 holds
    return (bits_LW.float() + 0.5) * (2.0**-23 * alpha / (tokens_L * width).sqrt()[:, None])


def scrambled(x: Tensor) -> Tensor:
    """splitmix64's finalizer, on int64 with wrap-around and logical shifts."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)
