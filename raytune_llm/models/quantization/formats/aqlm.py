"""AQLM's files (Egiazarian et al. 2024, arXiv 2401.06118): a group of weights is a sum of vectors, one of each codebook.

Codes are whole numbers that wrap around: the upper half of a codebook has negative ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_llm.models.quantization.formats.format import Format


@dataclass(frozen=True, kw_only=True)
class AQLM(Format):
    PARTS = ("codes", "codebooks", "scales")

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        """codes [n, k, C], codebooks [C, S, a, b], scales [n, 1, 1, 1] -> [n a, k b]."""
        codes, books, scales = parts["codes"], parts["codebooks"].float(), parts["scales"].float()
        (n, k, C), (_, S, a, b) = codes.shape, books.shape
        entries = codes.long() % S + S * torch.arange(C, device=codes.device)
        vectors = F.embedding_bag(entries.flatten(0, 1), books.reshape(C * S, a * b), mode="sum")
        return (vectors.view(n, k, a, b) * scales).transpose(1, 2).reshape(n * a, k * b)
