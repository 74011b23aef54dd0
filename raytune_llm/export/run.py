"""Runs `export`: writes to a folder beside the target, checks it, and renames it, so that no incomplete export is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.export.check import Difference, compare, has_memory, rows_to_check
from raytune_llm.export.source import DTYPES, Source, source_of
from raytune_llm.export.tensors import write
from raytune_llm.models.config_file import MODEL_CONFIG, write_config
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable

OnProgress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in total."""
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Exported:
    place: Path
    num_bytes: int
    difference: Difference | None
    unchecked: str | None
    """Why the export was not compared with its source."""


def export(run: ExportRun, on_progress: OnProgress = lambda done, total: None) -> Exported:
    settings = run.export
    assert settings.output_dir is not None
    place = Path(settings.output_dir)
    _check_place(place, overwrite=settings.overwrite)
    source = source_of(run)
    beside = place.with_name(f".{place.name}-new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with full_disk_explained(place):
            exported = FORMATS[settings.format](run, source, beside, on_progress)
            _take_place(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return exported


def _hf(run: ExportRun, source: Source, folder: Path, on_progress: OnProgress) -> Exported:
    """Write a folder that transformers loads."""
    settings = run.export
    dtype = DTYPES.get(settings.dtype)
    facts = source.outputs(dtype)
    total = sum(fact.num_bytes for fact in facts)
    check_space(folder.parent, total)
    folder.mkdir(parents=True)
    dtypes = {fact.name: fact.dtype for fact in facts}
    done = 0

    def told(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    source.copy_others(folder)
    write_config(folder / MODEL_CONFIG, source.config_json(dtype))
    write(folder, facts, settings.shard_bytes, lambda name: source.tensor(name, dtypes[name]), told)
    difference, unchecked = _compared(run, source, folder)
    (folder / "README.md").write_text(_card(source, settings.dtype, difference, unchecked))
    facts_of_export = {
        "base": str(source.model.path),
        "adapters": {adapter.folder: factor for adapter, factor in source.adapters},
        "dtype": settings.dtype,
        "difference": difference and asdict(difference),
        "unchecked": unchecked,
    }
    (folder / "export.json").write_text(json.dumps(facts_of_export, indent=1) + "\n")
    return Exported(Path(str(settings.output_dir)), total, difference, unchecked)


FORMATS: dict[str, Callable[[ExportRun, Source, Path, OnProgress], Exported]] = {"hf": _hf}


def _check_place(place: Path, *, overwrite: bool) -> None:
    try:
        check_writable(place.parent)
    except ConfigError as error:
        raise ConfigError("export.output_dir", error.rule, got=str(place), fix=error.fix) from None
    if place.exists() and not overwrite and (place.is_file() or any(place.iterdir())):
        fix = "Choose another one, or set export.overwrite=true."
        raise ConfigError("export.output_dir", "must be empty, or not there", got=str(place), fix=fix)


def check_space(folder: Path, num_bytes: int) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes + SPARE_BYTES:
        lacking = f"the export takes {num_bytes / 2**30:.1f} GiB, and {there} has {free / 2**30:.1f} GiB left"
        raise ResourceError(lacking, "Free some space, or set export.output_dir on a larger disk.")


def _take_place(beside: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    beside.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    old.unlink(missing_ok=True)


def _compared(run: ExportRun, source: Source, folder: Path) -> tuple[Difference | None, str | None]:
    """The difference from the source, or why it was not computed. Raises ConfigError if it exceeds export.max_kl."""
    settings = run.export
    if settings.check is False or settings.check_rows == 0:
        return None, "it was not asked for (export.check)"
    if settings.check == "auto" and not has_memory(source):
        return None, "there was not the memory for the model in float32"
    difference = compare(source, folder, rows_to_check(source, settings.check_rows))
    if difference is None:
        return None, "of several adapters, or with other weights than 1, nothing else computes the sum"
    if not difference.divergence <= settings.max_kl:
        raise ConfigError(
            "export.max_kl",
            f"is less than the divergence from the base with its adapter ({difference.said()})",
            got=settings.max_kl,
            fix="Set export.dtype=fp32, or raise it.",
        )
    return difference, None


def _card(source: Source, dtype: str, difference: Difference | None, unchecked: str | None) -> str:
    name = source.run.name if source.run is not None else Path(str(source.model.path)).name
    base = source.run.model.path if source.run is not None else source.model.path
    front = "---\nlibrary_name: transformers\n" + (f"base_model: {base}\n" if base else "") + "---\n"
    merged = ", ".join(f"{adapter.folder} (weight {factor:g})" for adapter, factor in source.adapters)
    what = f"{base} with the adapter of {merged} merged into it" if merged else f"trained whole from {base}"
    said = difference.said() if difference is not None else f"Not compared: {unchecked}"
    head = "" if difference is None else "Compared with the base and its adapter "
    return f"{front}\n# {name}\n\n{what}, exported with raytune_llm; dtype {dtype}.\n\n{head}{said}.\n"
