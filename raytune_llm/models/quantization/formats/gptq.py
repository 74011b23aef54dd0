"""GPTQ's files (Frantar et al. 2023, arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

A weight is scale * (number - zero), with a scale and a zero for each group of inputs and each output. Numbers are packed along
the inputs, zeros along the outputs. The first format holds each zero less one, `gptq_v2` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from raytune_llm.models.quantization.formats.format import Format
from raytune_llm.models.quantization.formats.words import unpacked

BITS = (2, 3, 4, 8)
LESS_ONE = {"gptq": True, "gptq_v2": False}
"""Whether its zeros are held less one."""


def _layout(given: Mapping[str, Any]) -> str:
    if given.get("is_marlin_format"):
        return "marlin"
    return str(given.get("checkpoint_format") or given.get("format") or "gptq").lower()


@dataclass(frozen=True, kw_only=True)
class GPTQ(Format):
    PARTS = ("qweight", "qzeros", "scales", "g_idx")

    bits: int
    group: int
    """Inputs that share a scale, if the files don't say which do; -1: all."""
    less_one: bool

    @classmethod
    def lacks(cls, given: Mapping[str, Any], model_type: str) -> str | None:
        if (layout := _layout(given)) not in LESS_ONE:
            return f"the layout {layout} ({' and '.join(LESS_ONE)} can be read)"
        if given.get("bits") not in BITS:
            return f"{given.get('bits')} bits ({', '.join(map(str, BITS))} can be read)"
        if (word := str(given.get("pack_dtype", "int32"))) != "int32":
            return f"words of {word} (int32 can be read)"
        return None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        return cls(bits=given["bits"], group=given.get("group_size", -1), less_one=LESS_ONE[_layout(given)])

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        words, scales_GN, groups_K = parts["qweight"], parts["scales"].float(), parts.get("g_idx")
        # some layers may have more bits than the config says: with the groups of their inputs, sizes tell
        bits = self.bits if groups_K is None else 32 * len(words) // len(groups_K)
        numbers_KN = unpacked(words, bits)
        zeros_GN = unpacked(parts["qzeros"].T, bits).T
        if self.less_one:
            zeros_GN = zeros_GN + 1 & (1 << bits) - 1
        if groups_K is None:
            K = len(numbers_KN)
            groups_K = torch.arange(K, device=words.device) // (self.group if self.group > 0 else K)
        groups_K = groups_K.long()
        return ((numbers_KN - zeros_GN.float()[groups_K]) * scales_GN[groups_K]).T
