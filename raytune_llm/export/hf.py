"""`export.format=hf`: a folder that transformers, vLLM and SGLang load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from raytune_llm.config.adapter import NoAdapter
from raytune_llm.config.resources import uses_ray
from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.check import outputs
from raytune_llm.export.in_quantized import is_quantized
from raytune_llm.export.on_nodes import write_on_nodes
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.export.tensors import write as write_tensors
from raytune_llm.models.config_file import MODEL_CONFIG, write_config


def hf(source: Source, run: ExportRun) -> Target:
    settings = run.export
    if settings.dtype not in ("auto", *DTYPES):
        rule = f"must be auto or one of {', '.join(DTYPES)} with export.format=hf"
        raise ConfigError("export.dtype", rule, got=settings.dtype, fix="Or set export.format=gguf.")
    if is_quantized(source.config) and settings.dtype != "auto":
        rule = "must be auto for weights that are quantized already, which are copied as they are"
        fix = "Or set export.into_quantized=true, which unpacks them."
        raise ConfigError("export.dtype", rule, got=settings.dtype, fix=fix)
    dtype = DTYPES.get(settings.dtype)
    facts = source.outputs(dtype)
    dtypes = {fact.name: fact.dtype for fact in facts}

    def write(folder: Path, on_bytes: OnBytes) -> None:
        source.copy_others(folder)
        write_config(folder / MODEL_CONFIG, source.config_json(dtype))
        if uses_ray(run.resources):
            write_on_nodes(source, facts, settings.shard_bytes, folder, run.resources, on_bytes)
        else:
            write_tensors(folder, facts, settings.shard_bytes, lambda name: source.tensor(name, dtypes[name]), on_bytes)

    def outputs_of(folder: Path, rows: Rows, device: torch.device) -> Iterator[Tensor]:
        written = replace(source.model, path=str(folder), revision=None, config={}, merged_adapters=[])
        return outputs(written, NoAdapter(name="none"), rows, device, scores=source.scores)

    return Target(sum(fact.num_bytes for fact in facts), write, outputs_of, "transformers", settings.dtype)
