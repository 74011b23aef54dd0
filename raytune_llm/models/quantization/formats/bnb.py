"""bitsandbytes' own files: NF4 and FP4 with all that unpacks them, and LLM.int8's rows with their largest values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytune_llm.models.quantization.formats.format import Format
from raytune_llm.models.quantization.nf4 import unpacked_as

CODES = ("nf4", "fp4")
OF_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"quant_state.bitsandbytes__{x}" for x in CODES))


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(Format):
    PARTS = ("weight", *(f"weight.{name}" for name in OF_FOUR_BITS), "SCB", "weight_format")
    package = ("bitsandbytes", "raytune-llm[nf4]")

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        held = parts["weight"]
        if "SCB" in parts:
            return held.float() * (parts["SCB"].float() / 127)[:, None]
        from bitsandbytes.functional import QuantState, dequantize_4bit

        beside = {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
        state: Any = QuantState.from_dict(beside, device=held.device)
        shape, state.dtype = state.shape, torch.float32
        state.shape = torch.Size(unpacked_as(shape, state.blocksize))
        return dequantize_4bit(held.view(torch.uint8), state).view(shape)  # some files hold the bytes as numbers of another type
