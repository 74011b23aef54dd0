"""A quantized export: like `hf`, but each quantized matrix is stored as several other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_llm.config.export import ExportConfig
from raytune_llm.errors import ConfigError
from raytune_llm.export.quantized.matrices import Matrices
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.export.tensors import TensorFact
from raytune_llm.export.tensors import write as write_tensors
from raytune_llm.models.config_file import MODEL_CONFIG, write_config


class Codec(Protocol):
    """The format in which single matrices are stored."""

    @property
    def max_kl(self) -> float:
        """The divergence of a model from its source, in nats per token, above which something is likely wrong."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The quantization_config in config.json, with which transformers loads it."""
        ...

    def facts(self, matrix: TensorFact) -> Sequence[TensorFact]:
        """Name in the file -> (dtype, shape) of the tensors that store a weight [N, K]."""
        ...

    def encode(self, matrix: TensorFact, weight_NK: Tensor) -> Mapping[str, Tensor]:
        """Name in the file -> tensor. weight_NK: float32."""
        ...


@dataclass(frozen=True)
class _Stored:
    """A tensor of the files, and the model's tensor from which it is made."""

    fact: TensorFact
    source: TensorFact


def encoded(source: Source, settings: ExportConfig, matrices: Matrices, codec: Codec) -> Target:
    dtype = dtype_of(settings)
    weights = {f"{layer}.weight" for layer in matrices.layers}
    stored = [
        _Stored(fact, matrix)
        for matrix in source.outputs(dtype)
        for fact in (codec.facts(matrix) if matrix.name in weights else [matrix])
    ]
    by_name = {one.fact.name: one for one in stored}

    def write(folder: Path, on_bytes: OnBytes) -> None:
        source.copy_others(folder)
        write_config(folder / MODEL_CONFIG, {**source.config_json(dtype), "quantization_config": codec.config})
        held: dict[str, Tensor] = {}  # the tensors of the current matrix

        def make(name: str) -> Tensor:
            if name not in held:
                matrix = by_name[name].source
                held.clear()
                if matrix.name in weights:  # in float32, so that it is rounded once
                    held.update(codec.encode(matrix, source.tensor(matrix.name, torch.float32)))
                else:
                    held[name] = source.tensor(matrix.name, matrix.dtype)
            return held[name]

        write_tensors(folder, [one.fact for one in stored], settings.shard_bytes, make, on_bytes)

    said = f"{settings.format} ({settings.dtype} what is not quantized)"
    outputs = partial(reloaded_outputs, trust_remote_code=source.model.trust_remote_code)
    return Target(sum(one.fact.num_bytes for one in stored), write, outputs, "transformers", said, codec.max_kl)


def dtype_of(settings: ExportConfig) -> torch.dtype | None:
    """The dtype of tensors that are not quantized; None: that in the base."""
    if settings.dtype not in ("auto", *DTYPES):
        rule = f"must be auto or one of {', '.join(DTYPES)} with export.format={settings.format}"
        raise ConfigError("export.dtype", rule, got=settings.dtype, fix="It is the dtype of tensors that are not quantized.")
    return DTYPES.get(settings.dtype)


@torch.no_grad()
def reloaded_outputs(folder: Path, rows: Rows, device: torch.device, *, trust_remote_code: bool) -> Iterator[Tensor]:
    """The log-probabilities [T - 1, V] of each row, with the model that transformers loads from the folder."""
    settings: dict[str, Any] = {"dtype": torch.float32, "device_map": device, "trust_remote_code": trust_remote_code}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    for ids in rows.ids:
        logits_TV = model(torch.from_numpy(ids.astype("int64"))[None].to(device), use_cache=False).logits[0]
        yield logits_TV[:-1].float().log_softmax(-1).cpu()


PACKAGES = {
    **dict.fromkeys(("fp8", "w8a8", "w4a16", "gptq", "awq"), ("compressed_tensors", "raytune-llm[quantized]")),
    "nf4": ("bitsandbytes", "raytune-llm[nf4]"),
}
"""Format -> the package that it needs, and the extra that installs it."""


def require(format: str) -> None:
    """Raises ConfigError if the format's package is not installed. Formats that are not in PACKAGES need none."""
    package, extra = PACKAGES.get(format, (None, None))
    if package is not None and find_spec(package) is None:
        rule, fix = f"can't be {format} here: {package} is not installed", f"Install it: pip install '{extra}'."
        raise ConfigError("export.format", rule, got=format, fix=fix)
