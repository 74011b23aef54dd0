"""Runs `export`: writes to a folder beside the target, checks it, and renames it, so that no incomplete export is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raytune_llm.byte_size import in_units
from raytune_llm.config.export import CALIBRATED, ExportConfig
from raytune_llm.config.plain import as_plain
from raytune_llm.config.run import ExportRun, TrainRun
from raytune_llm.errors import ConfigError, ResourceError, first_line
from raytune_llm.export.adapter import adapter
from raytune_llm.export.check import Difference, can_compare, compare
from raytune_llm.export.gguf.adapter import gguf_lora
from raytune_llm.export.gguf.file import gguf
from raytune_llm.export.gguf.llama_quantize import found_program
from raytune_llm.export.hf import hf
from raytune_llm.export.memory import device_for, ran_out
from raytune_llm.export.ollama.modelfile import ollama
from raytune_llm.export.place import EXPORTED, MADE_FROM, OTHERS, WEIGHTS, check_apart, is_whole, made_from, place_of
from raytune_llm.export.push import check_push, push
from raytune_llm.export.quantized.calibrated import calibrated
from raytune_llm.export.quantized.codec import require
from raytune_llm.export.quantized.environment import check_environment
from raytune_llm.export.quantized.nf4 import nf4
from raytune_llm.export.quantized.rounded import rounded
from raytune_llm.export.rows import contents_of, rows_to_check
from raytune_llm.export.source import WEIGHT_SUFFIXES, Source, check_to_come, source_of
from raytune_llm.export.target import Target
from raytune_llm.report.metrics import non_finite_as_strings
from raytune_llm.runs.contents import adapter_contents, folder_contents, model_contents
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import owned

OnProgress = Callable[[int, int], None]
"""(bytes written, bytes in total)."""
BESIDE = ("run", "adapters", "weights", "output_dir", "python", "llama_quantize", "overwrite", "push", "push_private")
"""Settings of `export` that don't decide the export's content by themselves: paths, and weights, which are recorded with
adapters."""
SPARE_BYTES = 64 * 2**20
MAX_KL_IN_QUANTIZED = 0.5
"""The default of export.max_kl with export.into_quantized, since dequantized weights are compared with the original ones."""
FORMATS: Mapping[str, Callable[[Source, ExportRun], Target]] = {
    "hf": hf,
    "adapter": adapter,
    "gguf": gguf,
    "gguf_lora": gguf_lora,
    "ollama": ollama,
    "fp8": rounded,
    "w8a8": rounded,
    "w4a16": rounded,
    "nf4": nf4,
    "gptq": calibrated,
    "awq": calibrated,
}
"""export.format -> makes the target; raises ConfigError for what the format doesn't support."""


@dataclass(frozen=True)
class Exported:
    place: Path
    num_bytes: int
    """The size of all its files."""
    difference: Difference | None
    unchecked: str | None
    """Why the export was not compared with its source."""
    notes: str = ""
    """The target's notes on the card."""
    commit: str | None = None
    """Its address on the hub; None: it was not pushed."""
    found: bool = False
    """Whether it existed already, made from the same files and settings, so that nothing was written."""


def check_ahead(run: ExportRun, trained: Mapping[str, TrainRun]) -> None:
    """Check what can be checked before the model is trained: the export's folder, the hub, the packages and programs that it
    needs, and the base. trained: the runs before it, by output folder.

    Raises ConfigError.
    """
    settings = run.export
    assert settings.output_dir is not None
    _place_of(run)
    check_push(settings)
    require(settings.format)
    if settings.format in CALIBRATED:
        check_environment(settings.format, settings.python, run.resources)
    if settings.llama_quantize is not None:
        found_program(settings.llama_quantize)
    if (comes := trained.get(str(settings.run))) is not None:
        check_to_come(comes, settings)


def export(run: ExportRun, on_progress: OnProgress = lambda done, total: None) -> Exported:
    """Write the export, unless the same one exists. on_progress: called with the bytes written and those in total. Raises
    ConfigError for what can't be exported, and ResourceError for a full disk or a hub that refuses the upload."""
    settings = run.export
    assert settings.output_dir is not None
    place = _place_of(run)
    check_push(settings)
    source = source_of(run)
    check_apart(place, source)
    now = _made_from(run, source)
    if made_from(place) == now and is_whole(place):
        with suppress(ConfigError), _beside(place):  # clears what a killed export left; not of one that is running
            pass
        return _found(place, settings, source)
    _check_place(place, settings, now)
    target = FORMATS[settings.format](source, run)
    target = replace(target, notes="\n\n".join(filter(None, (*source.other_bases, source.into_quantized, target.notes))))
    check_space(place.parent, target.num_bytes + target.passing_bytes)
    disk = full_disk_explained(place, setting="export.output_dir", then="nothing was left there")
    with disk, _beside(place) as folder:
        _write(target, folder, on_progress)
        difference, unchecked = _compared(run, source, target, folder)
        _describe(settings, source, target, folder, difference, unchecked, now)
        _check_place(place, settings, now)  # again, since something may have been put there, or put back, meanwhile
        _take_place(folder, place)
    commit = _pushed(place, settings, source, target.dtype)
    return Exported(place, _num_bytes(place), difference, unchecked, target.notes, commit)


def _place_of(run: ExportRun) -> Path:
    """Whether an export with the same settings may exist there. Whether its files are the same is only known when these exist."""
    settings = run.export
    assert settings.output_dir is not None
    is_alike = made_from(Path(settings.output_dir)).get("settings") == _settings(run)
    return place_of(settings.output_dir, overwrite=settings.overwrite or is_alike)


def _check_place(place: Path, settings: ExportConfig, now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the place has another export that may not be overwritten."""
    assert settings.output_dir is not None
    place_of(settings.output_dir, overwrite=settings.overwrite or made_from(place) == now)


def _found(place: Path, settings: ExportConfig, source: Source) -> Exported:
    """The export that exists in the place."""
    facts = json.loads((place / EXPORTED).read_text())
    difference = facts["difference"] and Difference(**facts["difference"])
    commit = _pushed(place, settings, source, facts["dtype"])
    return Exported(place, _num_bytes(place), difference, facts["unchecked"], commit=commit, found=True)


def _num_bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _pushed(place: Path, settings: ExportConfig, source: Source, dtype: str) -> str | None:
    return None if settings.push is None else push(place, settings, f"{source.name} as {settings.format}, dtype {dtype}")


def _settings(run: ExportRun) -> dict[str, Any]:
    """The settings that decide what is written."""
    plain = as_plain(run)
    return {"export": {name: value for name, value in plain["export"].items() if name not in BESIDE}, "data": plain["data"]}


def _made_from(run: ExportRun, source: Source) -> dict[str, Any]:
    """Everything on which the export depends: settings, and hashes or stamps of files."""
    trained = {"model": model_contents(source.model), "beside": source.beside and folder_contents(source.beside)}
    adapters = [[adapter_contents(adapter.folder), factor] for adapter, factor in source.adapters]
    return {"settings": _settings(run), **trained, "adapters": adapters, "data": contents_of(run.data)}


def _write(target: Target, folder: Path, on_progress: OnProgress) -> None:
    done = 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, target.num_bytes)

    target.write(folder, on_bytes)


def _describe(
    settings: ExportConfig,
    source: Source,
    target: Target,
    folder: Path,
    difference: Difference | None,
    unchecked: str | None,
    made_from: Mapping[str, Any],
) -> None:
    """Write the model card, and a JSON file with its figures."""
    (folder / "README.md").write_text(_card(source, target, difference, unchecked), encoding="utf-8")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    facts = {
        "base": str(source.model.path),
        "merged_adapters": [adapter.folder for adapter in source.under],
        "adapters": {adapter.folder: factor for adapter, factor in source.adapters},
        "format": settings.format,
        "dtype": target.dtype,
        "difference": difference and asdict(difference),
        "unchecked": unchecked,
        WEIGHTS: {file.name: file.stat().st_size for file in files if file.name.endswith(WEIGHT_SUFFIXES)},
        OTHERS: [file.name for file in files if not file.name.endswith(WEIGHT_SUFFIXES)],
        MADE_FROM: made_from,
    }
    (folder / EXPORTED).write_text(json.dumps(non_finite_as_strings(facts), indent=1, allow_nan=False) + "\n")


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A context with an empty temporary folder next to the place. What a killed export left there is removed, and an earlier
    export whose replacement was not completed is restored. Raises ConfigError while another export to this place is running."""
    work = place.with_name(f".{place.name}-export")
    new, old = work / "new", work / OLD
    try:
        with owned(work):
            try:
                _clear(new, old, place)
                new.mkdir()
                yield new
            finally:
                _clear(new, old, place)
    except ConfigError as error:
        if error.setting != "output_dir":
            raise
        raise ConfigError("export.output_dir", error.rule, got=str(place), fix=error.fix) from None
    finally:
        with suppress(OSError):  # another export to this place has begun
            work.rmdir()


def _clear(new: Path, old: Path, place: Path) -> None:
    if old.exists() and not place.exists():
        old.rename(place)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


NO_MEMORY = "there was not enough memory for the model in float32"
OLD = "old"
"""The name of the earlier export while it is being replaced."""


def _take_place(folder: Path, place: Path) -> None:
    old = folder.with_name(OLD)
    if place.exists():
        place.rename(old)
    folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def check_space(folder: Path, num_bytes: int) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes + SPARE_BYTES:
        lacking = (
            f"the export needs {in_units(num_bytes)} and {in_units(SPARE_BYTES)} to spare, but {there} has {in_units(free)} left"
        )
        raise ResourceError(lacking, "Free some space, or set export.output_dir on a larger disk.")


def _compared(run: ExportRun, source: Source, target: Target, folder: Path) -> tuple[Difference | None, str | None]:
    """The difference from the source, or why it was not computed. Raises ConfigError if it exceeds export.max_kl."""
    settings = run.export
    if settings.check is False or settings.check_rows == 0:
        return None, "it was switched off (export.check)"
    if not can_compare(source):
        return None, "nothing else computes the sum of several adapters, or an adapter with a weight other than 1"
    device = device_for(sum(torch.Size(fact.shape).numel() for fact in source.facts.values()))
    if settings.check == "auto" and device is None:
        return None, NO_MEMORY
    rows = rows_to_check(source, run.data, settings.check_rows)
    try:
        difference = compare(source, partial(target.outputs, folder), rows, device or torch.device("cpu"))
    except Exception as error:
        if not ran_out(error):
            raise
        if settings.check == "auto":
            return None, NO_MEMORY
        raise ResourceError(
            f"export.check=true needs more memory than there is ({first_line(error)})", "Set it to auto."
        ) from error
    allowed = max(target.max_kl, MAX_KL_IN_QUANTIZED) if source.into_quantized is not None else target.max_kl
    limit = allowed if settings.max_kl is None else settings.max_kl
    if not difference.divergence <= limit:
        raise ConfigError(
            "export.max_kl",
            f"is less than the divergence from the base with its adapter ({difference.said()})",
            got=limit,
            fix="Set another export.dtype or export.format, or raise it.",
        )
    return difference, None


def _card(source: Source, target: Target, difference: Difference | None, unchecked: str | None) -> str:
    base = source.run.model.path if source.run is not None else source.model.path
    front = (
        f"---\nlibrary_name: {target.library}\n" + (f"base_model: {base}\n" if base and not Path(base).exists() else "") + "---\n"
    )
    merged = ", ".join(f"{adapter.folder} (weight {factor:g})" for adapter, factor in source.adapters)
    under = [adapter.folder for adapter in source.under]
    merged = ", ".join(filter(None, (*under, merged)))
    what = f"{base} with the adapter of {merged} merged into it" if merged else f"trained whole from {base}"
    if not target.merges:
        what = f"The adapter of {merged}, to be put on {base}"
    said = difference.said() if difference is not None else f"Not compared: {unchecked}"
    head = "" if difference is None else "Compared with the base and its adapter "
    notes = f"\n{target.notes}\n" if target.notes else ""
    return f"{front}\n# {source.name}\n\n{what}, exported with raytune_llm; dtype {target.dtype}.\n\n{head}{said}.\n{notes}"
