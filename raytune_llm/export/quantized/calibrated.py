"""`export.format=gptq` and `awq`: 4-bit weights, quantized with calibration rows by llmcompressor.

The files are those of w4a16; awq has a zero point for each group too.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from raytune_llm.config.resources import INLINE, uses_ray
from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.hf import hf
from raytune_llm.export.quantized.codec import dtype_of, reloaded_outputs, require
from raytune_llm.export.quantized.environment import check_environment, quantize
from raytune_llm.export.quantized.matrices import matrices_of
from raytune_llm.export.quantized.rounded import SCHEMES, Rounded, group_size_of
from raytune_llm.export.rows import rows_to_calibrate
from raytune_llm.export.source import Source
from raytune_llm.export.target import OnBytes, Target

MAX_KL = 0.5
MERGED, QUANTIZED = "merged", "quantized"
"""Temporary folders within the export's folder."""


@dataclass(frozen=True)
class Method:
    needs_gpu: str | None
    """Why the method needs a GPU; None if it doesn't."""


METHODS = {
    "gptq": Method(None),
    "awq": Method("llmcompressor 0.14 pins memory for AWQ, which needs a GPU"),
}
"""By export.format."""


def calibrated(source: Source, run: ExportRun) -> Target:
    settings = run.export
    dtype_of(settings)
    require(settings.format)
    matrices = matrices_of(source, settings.format)
    group_size = group_size_of(settings, matrices)
    check_environment(settings.format, settings.python, run.resources)
    lacking = METHODS[settings.format].needs_gpu
    if lacking is not None and not uses_ray(run.resources) and not torch.cuda.is_available():
        fix = "Set export.format=gptq or w4a16, or resources=cluster."
        raise ConfigError("export.format", f"can't be {settings.format} here: {lacking}", got=settings.format, fix=fix)
    rows = rows_to_calibrate(source, run.data, settings.check_rows, settings.calibration_rows, settings.calibration_tokens)
    plain = replace(settings, format="hf", python=None, group_size=None)
    merged = hf(source, replace(run, export=plain, resources=INLINE))

    def write(folder: Path, on_bytes: OnBytes) -> None:
        (folder / MERGED).mkdir()
        merged.write(folder / MERGED, lambda num_bytes: None)
        job = {
            "model": str(folder / MERGED),
            "output": str(folder / QUANTIZED),
            "method": settings.format,
            "group_size": group_size,
            "skipped": list(matrices.skipped),
            "rows": [ids.tolist() for ids in rows.ids],
            "shard_bytes": settings.shard_bytes,
            "trust_remote_code": source.model.trust_remote_code,
        }
        quantize(job, settings.python, run.resources)
        source.copy_others(folder)
        for file in (folder / QUANTIZED).iterdir():
            if not (folder / file.name).exists():
                file.rename(folder / file.name)
        for made in (MERGED, QUANTIZED):
            shutil.rmtree(folder / made)
        on_bytes(num_bytes)

    estimate = Rounded(SCHEMES["w4a16"], group_size, ())
    weights = {f"{layer}.weight" for layer in matrices.layers}
    facts = [
        fact
        for whole in source.outputs(dtype_of(settings))
        for fact in (estimate.facts(whole) if whole.name in weights else [whole])
    ]
    said = f"{settings.format} (groups of {group_size}, calibrated on {rows.what}; {settings.dtype} what is not quantized)"
    outputs = partial(reloaded_outputs, trust_remote_code=source.model.trust_remote_code)
    num_bytes = sum(fact.num_bytes for fact in facts)
    return Target(num_bytes, write, outputs, "transformers", said, MAX_KL, merged.num_bytes)
