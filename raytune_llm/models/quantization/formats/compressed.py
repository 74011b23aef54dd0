"""compressed-tensors' files: integers and floats of 8 bits with scales, and integers of fewer bits in words.

transformers reads them itself where it loads a model. This is for a layer at a time, from files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from raytune_llm.models.quantization.formats.format import Format


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Format):
    PARTS = (
        "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
        "input_zero_point", "output_scale", "output_zero_point",
    )  # fmt: skip
    package = ("compressed_tensors", "raytune-llm[quantized]")

    layout: str
    """The package's name of how weights are stored."""
    scheme: Any

    @classmethod
    def lacks(cls, given: Mapping[str, Any], model_type: str) -> str | None:
        groups = given.get("config_groups") or {}
        if len(groups) != 1:
            return f"{len(groups)} groups of layers that are quantized in different ways (one can be read)"
        if given.get("sparsity_config") or given.get("transform_config"):
            return "sparse or rotated weights"
        return None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        from compressed_tensors.quantization import QuantizationConfig

        (scheme,) = QuantizationConfig.model_validate(
            {name: value for name, value in given.items() if name != "dequantize"}
        ).config_groups.values()
        return cls(layout=getattr(scheme, "format", None) or given["format"], scheme=scheme)

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        compressor: Any = BaseCompressor.get_value_from_registry(self.layout)
        return compressor.decompress(dict(parts), self.scheme)["weight"].float()
