"""`export.format=nf4`: QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314), in bitsandbytes' format.

It needs no data. transformers reads these files, and computes with the dequantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.quantized.codec import encoded, require
from raytune_llm.export.quantized.matrices import matrices_of
from raytune_llm.export.source import Source
from raytune_llm.export.target import Target
from raytune_llm.export.tensors import TensorFact

BLOCK, SCALES_BLOCK, VALUES = 64, 256, 16
"""Weights per scale, scales per scale of scales, and the values that a weight can have."""
STATE_BYTES = 256
"""The size of the JSON about a matrix, padded with spaces, since it has a number with a varying count of digits."""


def nf4(source: Source, run: ExportRun) -> Target:
    settings = run.export
    require(settings.format)
    matrices = matrices_of(source, settings.format)
    if narrow := [width for width in matrices.widths if width % BLOCK]:
        rule = (
            f"can't be nf4: blocks of {BLOCK} must fill the rows of each matrix "
            f"for bitsandbytes on CPUs, and one has {narrow[0]} columns"
        )
        raise ConfigError("export.format", rule, got=str(source.folder), fix="Set export.format=fp8 or w8a8.")
    return encoded(source, settings, matrices, NF4(matrices.skipped))


@dataclass(frozen=True)
class NF4:
    skipped: Sequence[str]
    max_kl: float = 0.5

    @property
    def config(self) -> Mapping[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": list(self.skipped),
        }

    def facts(self, matrix: TensorFact) -> Sequence[TensorFact]:
        weights = torch.Size(matrix.shape).numel()
        scales = -(-weights // BLOCK)
        return [
            TensorFact(matrix.name, ((weights + 1) // 2, 1), torch.uint8),
            TensorFact(f"{matrix.name}.absmax", (scales,), torch.uint8),
            TensorFact(f"{matrix.name}.quant_map", (VALUES,), torch.float32),
            TensorFact(f"{matrix.name}.nested_absmax", (-(-scales // SCALES_BLOCK),), torch.float32),
            TensorFact(f"{matrix.name}.nested_quant_map", (256,), torch.float32),
            TensorFact(f"{matrix.name}.quant_state.bitsandbytes__nf4", (STATE_BYTES,), torch.uint8),
        ]

    def encode(self, matrix: TensorFact, weight_NK: Tensor) -> Mapping[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight_NK, quant_type="nf4", blocksize=BLOCK, compress_statistics=True)
        state.dtype = matrix.dtype  # the dtype after dequantizing
        tensors = {f"{matrix.name}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        about = f"{matrix.name}.quant_state.bitsandbytes__nf4"
        return {**tensors, matrix.name: packed, about: _filled(tensors[about])}


def _filled(state: Tensor) -> Tensor:
    """The JSON padded to STATE_BYTES bytes."""
    text = bytes(state.tolist()).ljust(STATE_BYTES)
    assert json.loads(text) and len(text) == STATE_BYTES, text
    return torch.tensor(list(text), dtype=torch.uint8)
