"""HQQ's files, as transformers writes them: packed weights, scales and zeros of groups, and as tensors what the package knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raytune_llm.models.quantization.formats.format import Format


@dataclass(frozen=True, kw_only=True)
class HQQFiles(Format):
    PARTS = (
        "W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "view_as_float", "unpack_view_dtype",
        "compute_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
        "optimize", "round_zero",
    )  # fmt: skip
    package = ("hqq", "raytune-llm[hqq]")

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        from hqq.core.quantize import Quantizer

        packing = "".join(map(chr, parts["packing"].tolist()))
        known = {
            **{name: int(parts[name]) for name in ("nbits", "group_size", "axis")},
            **{name: parts[name].float() for name in ("scale", "zero")},
            "shape": torch.Size(parts["shape"].tolist()),
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": bool(parts["view_as_float"]) if "view_as_float" in parts else False,
            "compute_dtype": torch.float32,
        }
        return Quantizer.dequantize(parts["W_q"], known)
