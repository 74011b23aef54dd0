"""`export.format=fp8`, `w8a8` and `w4a16`: weights rounded to the nearest value, in the files of compressed-tensors.

They need no data. A scale is the largest magnitude of an output channel, or of a group of its inputs. Activations of fp8 and w8a8
are quantized dynamically with a scale per token. transformers reads these files, and vLLM and SGLang should too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raytune_llm.config.export import ExportConfig
from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.quantized.codec import encoded, require
from raytune_llm.export.quantized.matrices import Matrices, matrices_of
from raytune_llm.export.source import Source
from raytune_llm.export.target import Target
from raytune_llm.export.tensors import TensorFact

GROUP_SIZES = (128, 64, 32)
"""The numbers of inputs per scale that vLLM's kernels support. The first that divides the width of every matrix is used."""
WORD_BITS = 32
"""Four-bit numbers are packed into words of this many bits."""


@dataclass(frozen=True)
class Scheme:
    preset: str
    """Its name in compressed-tensors."""
    files: str
    """The name of its storage format in compressed-tensors."""
    max_kl: float
    weight: torch.dtype | None = None
    """The dtype of the weight; None: packed four-bit numbers."""


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("FP8_DYNAMIC", "float-quantized", 0.1, torch.float8_e4m3fn),
    "w8a8": Scheme("W8A8", "int-quantized", 0.1, torch.int8),
    "w4a16": Scheme("W4A16", "pack-quantized", 0.5),
}
"""By export.format."""


def rounded(source: Source, run: ExportRun) -> Target:
    settings = run.export
    scheme = SCHEMES[settings.format]
    require(settings.format)
    matrices = matrices_of(source, settings.format)
    group_size = group_size_of(settings, matrices) if scheme.weight is None else None
    return encoded(source, settings, matrices, Rounded(scheme, group_size, matrices.skipped))


def group_size_of(settings: ExportConfig, matrices: Matrices) -> int:
    """The number of inputs per scale. Raises ConfigError if it does not divide the width of every matrix."""
    sizes = GROUP_SIZES if settings.group_size is None else (settings.group_size,)
    for size in sizes:
        if all(width % size == 0 for width in matrices.widths):
            return size
    widths = ", ".join(map(str, matrices.widths))
    if settings.group_size is None:
        rule = f"can't be {settings.format}: none of {', '.join(map(str, sizes))} divides the widths of all matrices ({widths})"
        raise ConfigError("export.format", rule, got=settings.format, fix="Set export.format=fp8 or w8a8.")
    fix = f"Set another one of {', '.join(map(str, GROUP_SIZES))}, or null."
    raise ConfigError("export.group_size", f"must divide the widths of all matrices ({widths})", got=settings.group_size, fix=fix)


@dataclass(frozen=True)
class Rounded:
    kind: Scheme
    group_size: int | None
    """The number of inputs per scale; None: one scale per output channel."""
    skipped: Sequence[str]

    @property
    def max_kl(self) -> float:
        return self.kind.max_kl

    @cached_property
    def scheme(self) -> Any:
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.kind.preset, ["Linear"])
        if self.group_size is not None:
            assert scheme.weights is not None
            scheme.weights.group_size = self.group_size
        return scheme

    @property
    def config(self) -> Mapping[str, Any]:
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        return QuantizationConfig(
            config_groups={"group_0": self.scheme},
            format=self.kind.files,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(self.skipped),
        ).model_dump(mode="json")

    def facts(self, matrix: TensorFact) -> Sequence[TensorFact]:
        layer = matrix.name.removesuffix(".weight")
        rows, columns = matrix.shape
        scales = 1 if self.group_size is None else columns // self.group_size
        scale = TensorFact(f"{layer}.weight_scale", (rows, scales), matrix.dtype)
        if self.kind.weight is not None:
            return [TensorFact(matrix.name, matrix.shape, self.kind.weight), scale]
        words = -(-columns * self.scheme.weights.num_bits // WORD_BITS)
        packed = TensorFact(f"{layer}.weight_packed", (rows, words), torch.int32)
        return [packed, scale, TensorFact(f"{layer}.weight_shape", (2,), torch.int64)]

    def encode(self, matrix: TensorFact, weight_NK: Tensor) -> Mapping[str, Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization.utils import calculate_qparams

        weights = self.scheme.weights
        wide_NGK = weight_NK.unflatten(1, (-1, self.group_size or weight_NK.shape[1]))
        scale_NG, zero_NG = calculate_qparams(wide_NGK.amin(-1), wide_NGK.amax(-1), weights)
        scale_NG = scale_NG.to(matrix.dtype)  # the stored dtype, so that weights are rounded with the scale that readers use
        given = {"weight": weight_NK, "weight_scale": scale_NG.float(), "weight_zero_point": zero_NG}
        compressed = BaseCompressor.get_value_from_registry(self.kind.files).compress(given, self.scheme)
        layer = matrix.name.removesuffix(".weight")
        return {f"{layer}.{name}": tensor for name, tensor in {**compressed, "weight_scale": scale_NG}.items()}
