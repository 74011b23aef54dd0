"""AWQ's files (Lin et al. 2024, arXiv 2306.00978), as AutoAWQ writes them for matrix products (version gemm).

As GPTQ's, but numbers are packed along the outputs as zeros are, eight to a word in an order of their own, and zeros are held as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

from raytune_llm.models.quantization.formats.format import Format
from raytune_llm.models.quantization.formats.words import unpacked

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight outputs, where each is in its word."""


@dataclass(frozen=True, kw_only=True)
class AWQ(Format):
    PARTS = ("qweight", "qzeros", "scales")

    @classmethod
    def lacks(cls, given: Mapping[str, Any], model_type: str) -> str | None:
        version = str(given.get("version") or given.get("format") or "gemm").lower()
        if version != "gemm" or given.get("backend") == "llm-awq":
            return f"the version {version if version != 'gemm' else 'llm-awq'} (gemm can be read)"
        bits = given.get("bits", given.get("w_bit", BITS))
        if bits != BITS:
            return f"{bits} bits (4 can be read)"
        if model_type in AWQ_SCALES_MAPPINGS:
            return f"scales within the activations of {model_type}, which the layers here have not"
        return None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        return cls()

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        numbers_NK, zeros_NG, scales_NG = _outputs(parts["qweight"]), _outputs(parts["qzeros"]), parts["scales"].float().T
        (N, K), G = numbers_NK.shape, zeros_NG.shape[1]
        return ((numbers_NK.view(N, G, K // G) - zeros_NG.float()[..., None]) * scales_NG[..., None]).view(N, K)


def _outputs(words: Tensor) -> Tensor:
    """[X, N / 8] -> [N, X]."""
    numbers = unpacked(words.T, BITS)
    return numbers.view(-1, 8, len(words))[:, list(PLACES)].flatten(0, 1)
