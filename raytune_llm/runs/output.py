"""The output folder: whether a run may use it, and the model in its `final/`."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_llm.byte_size import in_units
from raytune_llm.config.run import TrainRun
from raytune_llm.disk import free_bytes
from raytune_llm.errors import ConfigError, DataError, ResourceError, RunLost, UserError
from raytune_llm.finished import FINISHED
from raytune_llm.report.metrics import ADOPTED, history, write_adopted
from raytune_llm.storage import away_in, no_access_in, no_space_in
from raytune_llm.train import checkpoint_files

log = logging.getLogger(__name__)
RESUMES = "the same command resumes from the newest checkpoint"
# Settings that may change when a run is resumed: where and how it is computed, and what it reports.
# Data sources are compared by content (the stores' manifests), not by path.
_FREE = {
    "name", "output_dir", "resume", "log_format", "resources", "strategy", "checkpoint", "tracking",
    "data.cache", "data.path", "data.eval_path", "data.eval_split", "data.eval_names",
    "data.max_bad_fraction", "model.attention", "train.micro_batch_size", "train.compile", "train.cuda_graphs",
    "train.activation_checkpointing", "train.log_every_steps", "train.eval_every_steps", "train.eval_at", "train.eval_on_start",
    "train.early_stopping", "train.exact_match_rows", "train.pause_at", "train.sample_rows", "train.max_new_tokens",
    "train.max_nonfinite_steps", "train.stall_timeout_s", "train.profile",
    "train.early_stopping_metric", "train.early_stopping_mode", "train.eval_tasks", "train.eval_task_questions",
}  # fmt: skip


def identity(run: TrainRun, manifests: dict[str, str]) -> dict[str, str]:
    """Everything that a run's numbers depend on: its settings as flat JSON by dotted path, and the hashes of its token stores."""
    settings = asdict(run)  # type: ignore[call-overload]  # pydantic's dataclasses are dataclasses, which pyright can't see
    return {"settings": json.dumps(dict(_flat(settings)), sort_keys=True), **manifests}


def open_output(run: TrainRun, folder: Path, identity_now: dict[str, str]) -> int | None:
    """Prepare the folder for the run. Returns the step to resume from, if any.

    Raises ConfigError if `resume` doesn't permit what the folder has, or if it belongs to another run.
    """
    checkpoints = folder / "checkpoints"
    checkpoint_files.sweep(checkpoints)
    if run.resume == "never":
        for path in (checkpoints, folder / "final", folder / "tensorboard", folder / "profile"):
            shutil.rmtree(path, ignore_errors=True)
        records = ("metrics.jsonl", "samples.jsonl", "scores.jsonl", "scores.png", ADOPTED)
        for name in (*records, "summary.json", "loss.png", FINISHED):
            (folder / name).unlink(missing_ok=True)
    step = checkpoint_files.newest_sound(checkpoints)
    if step is None:
        if run.resume == "must":
            raise ConfigError("resume", f"can't be must where {checkpoints} holds no complete checkpoint", fix="Set resume=auto.")
        return None
    _, identity_then = checkpoint_files.read_progress(checkpoints, step)
    _same_run(run.output_dir, identity_then, identity_now)
    return step


def adopt(run: TrainRun, donor: Path) -> int:
    """Replace the run's checkpoints with another run's newest one, from which it then resumes, and its best one, which may become
    final/. Returns the step of the newest.

    donor: the other run's output folder. Files are hard links if both are on one file system. Raises ConfigError if the donor has
    no checkpoint.
    """
    folder = Path(run.output_dir)
    there, here = donor / "checkpoints", folder / "checkpoints"
    step = checkpoint_files.newest_sound(there)
    if step is None:
        raise ConfigError("a clone", "needs a trial with a checkpoint", got=str(donor), fix="Choose another one.")
    best = checkpoint_files.read_progress(there, step)[0].best_step
    shutil.rmtree(here, ignore_errors=True)
    for one in checkpoint_files.complete_steps(there):
        if one in (step, best):
            _adopt_checkpoint(there, here, one, identity(run, {}))
    write_adopted(folder, [record for record in history(donor) if record["step"] <= step])
    return step


def _adopt_checkpoint(there: Path, here: Path, step: int, identity_now: dict[str, str]) -> None:
    old, new = (checkpoint_files.path_of(folder, step) / "state" for folder in (there, here))
    shutil.copytree(old, new, copy_function=_link)
    document = checkpoint_files.read_document(checkpoint_files.path_of(there, step))
    hashes = document.pop(checkpoint_files.FILES)
    checkpoint_files.write_document(here, step, {**document, **identity_now}, hashes)
    checkpoint_files.mark_complete(here, step)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def finished(run: TrainRun, folder: Path, identity_now: dict[str, str]) -> bool:
    """Whether the folder has this run, finished and complete. Raises ConfigError if another run finished in it.

    A `final/` with lost or changed files does not count as finished: the run resumes from its newest checkpoint and writes it
    again.
    """
    end = _end_of(folder)
    if end is None:
        return False
    files, identity_then = end
    _same_run(run.output_dir, identity_then, identity_now)
    lost = [name for name, digest in files.items() if checkpoint_files.digest(folder / name) != digest]
    if lost:
        log.warning("%s has changed since it was written (%s); it is written again", folder / "final", ", ".join(lost[:3]))
    return not lost


def _end_of(folder: Path) -> tuple[dict[str, str], dict[str, str]] | None:
    """The content of finished.json: file -> hash of the run's files, and the run's identity. None if no run has finished
    there."""
    try:
        then = json.loads((folder / FINISHED).read_text())
        files, identity_then = dict(then["files"]), dict(then["identity"])
        json.loads(identity_then["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return files, identity_then


def check_final(run: TrainRun, folder: Path) -> None:
    """Raises ConfigError if the run would replace a `final/` of unknown origin: nothing in the folder tells which run wrote
    it."""
    final = folder / "final"
    if run.resume == "never" or not final.is_dir() or not any(final.iterdir()):
        return
    if _end_of(folder) is None and not checkpoint_files.complete_steps(folder / "checkpoints"):
        raise ConfigError(
            "output_dir",
            f"holds a final/ that would be replaced, and no {FINISHED} or checkpoint that says which run wrote it",
            got=run.output_dir,
            fix="Choose another output_dir, or set resume=never to start again there.",
        )


def mark_finished(folder: Path, identity_now: dict[str, str]) -> None:
    """Record which run finished in the folder, and the files that it wrote. Called last."""
    paths = [folder / "summary.json", *sorted(path for path in (folder / "final").rglob("*") if path.is_file())]
    files = {str(path.relative_to(folder)): checkpoint_files.digest(path) for path in paths}
    beside = folder / f".{FINISHED}-new"
    beside.write_text(json.dumps({"identity": identity_now, "files": files}, indent=1))
    beside.rename(folder / FINISHED)


@contextmanager
def as_found_where_refused(folder: Path) -> Iterator[None]:
    """Restore (or remove) run.yaml if the command is refused before it wrote its first record."""
    described, metrics = folder / "run.yaml", folder / "metrics.jsonl"
    found, records = _content(described), _content(metrics)
    try:
        yield
    except (ConfigError, DataError):
        if _content(metrics) == records:
            described.unlink(missing_ok=True)
            if found is not None:
                described.write_bytes(found)
        raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@contextmanager
def full_disk_explained(folder: Path, *, setting: str = "output_dir", then: str = RESUMES) -> Iterator[None]:
    """Turns the OSError of a full disk, a quota or a limit on file size, or of a folder that became read-only or was removed,
    into a ResourceError that says what to do, and the error of a file system that does not answer into RunLost.

    setting: the setting that names the folder. then: what the same command does once there is space.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (away := away_in(error)) is not None:
            raise RunLost(f"{folder} can't be read or written: {away}", f"Once the storage answers, {then}.") from error
        if (no_access := no_access_in(error, folder)) is not None:
            raise ResourceError(
                f"{folder} can't be written: {no_access}", f"Make it a folder that can be written; {then}."
            ) from error
        reason = no_space_in(error)
        if reason is None:
            raise
        free = free_bytes(folder)
        raise ResourceError(
            f"{folder} can't be written: {reason} ({in_units(free)} are free)",
            f"Free some space, or set {setting} on a larger disk; {then}.",
        ) from error


def _same_run(output_dir: str, then: dict[str, str], now: dict[str, str]) -> None:
    old, new = json.loads(then["settings"]), json.loads(now["settings"])
    changed = [
        f"{key} from {old.get(key)} to {new.get(key)}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]
    changed += [
        f"the {name} data" for name in sorted(then.keys() | now.keys()) if name != "settings" and then.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            "output_dir",
            f"holds another run; what changed: {', '.join(changed)}",
            got=output_dir,
            fix="Restore it to resume, choose another output_dir, or set resume=never to start again there.",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in _FREE:
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def write_final(folder: Path, save: Callable[[Path], None], card: str) -> None:
    """Write the model with `save`, and a model card, to a temporary folder that then replaces `folder` by renaming."""
    beside = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(beside, ignore_errors=True)
    save(beside)
    (beside / "README.md").write_text(card)
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    (folder.parent / FINISHED).unlink(missing_ok=True)  # it describes the old model
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _loaded_on(run: TrainRun) -> str:
    """For the model card: how to make the merged base of an adapter, if there is one; else empty."""
    if run.adapter.trains_base or not run.model.merged_adapters or run.model.path is None:
        return ""
    return (
        "It is an adapter of that merged model, not of the one at the path. `python -m raytune_llm export` makes it, with "
        "`model.path` and `model.merged_adapters` of `run.yaml`.\n\n"
    )


def model_card(run: TrainRun, step: int, loss: float | None) -> str:
    base = run.model.base_name if run.model.path else run.model.config.get("model_type", "a fresh model")
    library = "transformers" if run.adapter.trains_base else "peft"
    front = f"---\nlibrary_name: {library}\n" + (f"base_model: {run.model.path}\n" if run.model.path else "") + "---\n"
    loss_text = "" if loss is None else f" The training loss at the end was {loss:.4f}."
    return (
        f"{front}\n# {run.name}\n\n{base}, trained with raytune_llm: stage {run.stage.name}, adapter {run.adapter.option}, "
        f"{step} steps.{loss_text}\n\n{_loaded_on(run)}Every setting is in `run.yaml` beside this folder.\n"
    )
