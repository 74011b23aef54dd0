"""Weights in four bits that are small floating-point numbers, in blocks with scales like NF4's. bitsandbytes' other code."""

from __future__ import annotations

from functools import partial

from raytune_llm.models.quantization.nf4 import NF4, NF4Linear, pack_experts


class FP4Linear(NF4Linear):
    CODE = "fp4"


class FP4(NF4):
    layer = FP4Linear
    replaces_experts = staticmethod(partial(pack_experts, code=FP4Linear.CODE))
