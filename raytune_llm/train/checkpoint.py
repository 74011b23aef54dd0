"""Checkpoints: `checkpoints/step-<n>/` with the training state, progress.json, and COMPLETE written last.

progress.json holds a hash of every file of the state. A checkpoint whose files no longer have these hashes is passed over, with a
message, and the one before it is taken.

The state is torch's distributed checkpoint format: each worker writes its part, and a reader of any world size or strategy takes
what it needs. A folder without COMPLETE is never read, and is removed at the next start. Checkpoints in an object store:
remote_checkpoints.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from raytune_llm.byte_size import in_units
from raytune_llm.errors import DataError, ResourceError, RunLost
from raytune_llm.file_hash import sha256_of
from raytune_llm.storage import away_in, causes, patiently
from raytune_llm.train.progress import Progress

log = logging.getLogger(__name__)
COMPLETE = "COMPLETE"
PROGRESS = "progress.json"
METADATA = ".metadata"
"""The file of torch's format that says which file holds what; the worker with rank 0 writes it."""
FILES = "files"
"""In progress.json: name -> sha256 of each file of the state."""
STEP = re.compile(r"step-(\d+)")
HASHED_AT_ONCE = 8
"""Files of a checkpoint that one process hashes at the same time, so that it reads at the disk's rate and not at a core's."""
FORMAT_VERSION = 2
"""Increase it when the format of progress.json or of the state changes."""


class Place(Protocol):
    """Where the checkpoints of a run are kept: a folder that all workers share, or an object store (remote_checkpoints.py)."""

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        ...

    def newest_sound(self) -> int | None:
        """The newest intact checkpoint, whose files are on this machine then; None if there is none. Raises DataError if all are
        damaged."""
        ...

    def fetch(self, step: int, *, checked: bool = False) -> str | None:
        """Bring a checkpoint's files to this machine. Returns what is wrong with it. checked: rank 0 compared the hashes."""
        ...

    def keep(self, step: int, files: Sequence[Path], rank: int, world: int) -> Sequence[Path]:
        """Keep the files that this machine has of a state being saved. Returns the worker's share of them, for their hashes."""
        ...

    def complete(self, step: int) -> None:
        """Mark the checkpoint as complete. Called on rank 0, after all files are kept."""
        ...

    def remove(self, step: int) -> None: ...

    def discard(self, step: int) -> None:
        """As `remove`, after a failure: raises nothing."""
        ...

    def keep_here(self, steps: Sequence[int]) -> None:
        """Remove what this machine alone has of all other steps."""
        ...


class SharedFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def complete_steps(self) -> list[int]:
        return complete_steps(self._folder)

    def newest_sound(self) -> int | None:
        return newest_sound(self._folder)

    def fetch(self, step: int, *, checked: bool = False) -> str | None:
        return None

    def keep(self, step: int, files: Sequence[Path], rank: int, world: int) -> Sequence[Path]:
        return files[rank::world]

    def complete(self, step: int) -> None:
        (path_of(self._folder, step) / COMPLETE).touch()

    def remove(self, step: int) -> None:
        remove(self._folder, step)

    def discard(self, step: int) -> None:
        shutil.rmtree(path_of(self._folder, step), ignore_errors=True)

    def keep_here(self, steps: Sequence[int]) -> None:
        return


class Checkpoints:
    """The checkpoints of one run, as one worker sees them."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        keep_best: bool = False,
        place: Place | None = None,
    ) -> None:
        """Keeps the newest `keep` checkpoints, and with `keep_best` the one with the lowest eval loss.

        place: None for `folder` itself; of an object store, `folder` is this machine's part.
        """
        self.folder, self.keep, self.keep_best, self._place = folder, keep, keep_best, place or SharedFolder(folder)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._writing: Future[None] | None = None
        self._staging = Staging()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        # The background writer has its own process group, so that its collectives don't interleave with training's.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, state: Mapping[str, Tensor], progress: Progress, identity: Mapping[str, str]) -> None:
        """Collective over all workers. `identity` is what a resumed run must share with this one."""
        self.wait()
        document = {"format_version": FORMAT_VERSION, **asdict(progress), **identity}
        if self._pool is None:
            self._write(dict(state), progress.step, progress.best_step, document)
        else:
            self._writing = self._pool.submit(self._write, self._staging.copy(state), progress.step, progress.best_step, document)

    def newest(self) -> int | None:
        """The newest intact checkpoint, as rank 0 finds it; its files are here then. Collective over all workers."""
        if self._group is None:
            return self._place.newest_sound()
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [self._place.newest_sound()]
            except (DataError, ResourceError) as error:
                found = [error]
            except OSError as error:
                found = [_away(f"the checkpoints in {self.folder} can't be read", error.strerror or str(error))]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if isinstance(found[0], DataError | ResourceError):
            raise found[0]
        if found[0] is not None:
            self._fetch(found[0])
        return found[0]

    def _fetch(self, step: int) -> None:
        """What this machine lacks of a checkpoint that rank 0 found intact."""
        if (problem := self._place.fetch(step, checked=True)) is not None:
            raise DataError(f"{self._place}/step-{step}", problem, "Repeat the command; it resumes from an older checkpoint.")

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises the writer's error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)  # gloo's threads poll, also for a group that nobody uses any more

    def load(self, step: int, fill: Callable[[Mapping[str, Tensor], Callable[[dict[str, Tensor]], None]], None]) -> None:
        """`fill(kept, read)` is the strategy's `load`."""
        folder = path_of(self.folder, step) / "state"
        self._fetch(step)
        try:
            metadata = patiently(f"{folder} can't be read", FileSystemReader(folder).read_metadata)
            entries = metadata.state_dict_metadata
        except (OSError, EOFError, ValueError, UnpicklingError) as error:
            if (away := away_in(error)) is not None:
                raise _away(f"{folder} can't be read", away) from error
            raise DataError(
                str(folder), f"can't be read ({error})", "Delete this checkpoint; the run then resumes from an older one."
            ) from None
        kept = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

        def read(state: dict[str, Tensor]) -> None:
            missing = sorted(state.keys() ^ kept.keys())
            if missing:
                raise DataError(
                    str(folder), f"holds other parameters than this run trains (such as {missing[0]})", "Set resume=never."
                )

            def loaded() -> None:
                reader = FileSystemReader(folder)
                dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=self._group is None)

            with one_process_is_meant():
                try:
                    patiently(f"{folder} can't be read", loaded)
                except CheckpointException as error:
                    _raise_interrupt(error)
                    if (away := away_in(error)) is not None:
                        raise _away(f"{folder} can't be read", away) from error
                    raise

        fill(kept, read)

    def _write(self, state: dict[str, Tensor], step: int, best_step: int | None, document: Mapping[str, Any]) -> None:
        folder = path_of(self.folder, step)
        what = f"checkpoint step-{step} can't be written to {self.folder}"

        def begin() -> None:
            self._place.remove(step)
            folder.mkdir(parents=True)

        def write() -> None:
            writer = FileSystemWriter(folder / "state", single_file_per_rank=True)
            with one_process_is_meant():
                dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

        def complete(hashes: Mapping[str, str]) -> None:
            (folder / PROGRESS).write_text(json.dumps({**document, FILES: hashes}, indent=1))
            self._place.complete(step)
            self._prune(step, best_step)

        try:
            if self.rank == 0:
                patiently(what, begin)
            if self._group is not None:
                dist.barrier(self._group)
            patiently(what, write)  # torch tells all workers of a failure of one
            hashes = self._hashes(step, what)
            if self.rank == 0:
                patiently(what, lambda: complete(hashes))
            self._place.keep_here([step])
        except RunLost:
            raise  # where the storage is away, or the checkpoint is another process's, nothing can or may be removed
        except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
            if (away := away_in(error)) is not None:
                raise _away(what, away) from error
            if self.rank == 0:
                self._place.discard(step)
            _raise_interrupt(error)
            if no_space := no_space_in(error):
                free = in_units(shutil.disk_usage(self.folder).free)
                raise ResourceError(
                    f"{what}: {no_space} ({free} are free)",
                    "Free some space, lower checkpoint.keep, or set output_dir on a larger disk; repeating the command resumes.",
                ) from error
            raise

    def _hashes(self, step: int, what: str) -> dict[str, str]:
        """Hashes of all files, each worker its share. Collective over all workers, after all of them have written."""
        rank, world = (self.rank, dist.get_world_size(self._group)) if self._group is not None else (0, 1)

        def kept() -> dict[str, str]:
            files = sorted((path_of(self.folder, step) / "state").iterdir())
            return {path.name: sha256_of(path) for path in self._place.keep(step, files, rank, world)}

        mine = patiently(what, kept)
        if self._group is None:
            return mine
        found: list[dict[str, str]] = [{} for _ in range(world)]
        dist.all_gather_object(found, mine, group=self._group)
        return {name: digest for part in found for name, digest in part.items()}

    def _prune(self, newest: int, best: int | None) -> None:
        for step in self._place.complete_steps()[: -self.keep]:
            if step != newest and not (self.keep_best and step == best):
                self._place.remove(step)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. Folders with other names are ignored.

    Raises OSError if the file system does not say: a run that took this for no checkpoint would begin anew.
    """
    return sorted(step for step in _steps(folder) if _exists(path_of(folder, step) / COMPLETE))


def _steps(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(found[1]) for name in names if (found := STEP.fullmatch(name)) is not None]


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def newest_sound(folder: Path) -> int | None:
    """The newest checkpoint whose files match their hashes; None if there is no checkpoint.

    Says which newer ones are damaged. Raises DataError where all are.
    """
    steps = patiently(f"{folder} can't be read", lambda: complete_steps(folder))
    return newest_of(str(folder), steps, partial(damage, folder))


def newest_of(where: str, steps: Sequence[int], problem_of: Callable[[int], str | None]) -> int | None:
    """As newest_sound, of these steps, ascending. problem_of: what is wrong with one; None if it is intact."""
    problems: list[str] = []
    for step in reversed(steps):
        problem = problem_of(step)
        if problem is None:
            for known in problems:
                log.warning("checkpoint %s: using step-%d", known, step)
            return step
        problems.append(f"step-{step} is damaged ({problem})")
    if problems:
        what, fix = "; ".join(problems), "Set resume=never to start anew, or choose another output_dir."
        raise DataError(where, f"holds no usable checkpoint: {what}", fix)
    return None


def damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint's files; None if they match their hashes."""
    place = path_of(folder, step)
    try:
        values = read_document(place)
    except DataError as error:
        return error.problem

    def problem(name: str, known: str) -> str | None:
        try:
            path = place / "state" / name
            same = patiently(f"{path} can't be read", partial(sha256_of, path)) == known
            return None if same else f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"

    hashes: dict[str, str] = values[FILES]
    with ThreadPoolExecutor(HASHED_AT_ONCE, thread_name_prefix="hash") as pool:
        return next((found for found in pool.map(problem, hashes, hashes.values()) if found is not None), None)


def read_progress(folder: Path, step: int) -> tuple[Progress, dict[str, str]]:
    """The progress of the run, and the identity that it was saved with."""
    values = read_document(path_of(folder, step))
    names = Progress.__dataclass_fields__
    progress = Progress(**{name: value for name, value in values.items() if name in names})
    return progress, {name: value for name, value in values.items() if name not in names and name != FILES}


def read_document(place: Path) -> dict[str, Any]:
    try:
        values = json.loads(patiently(f"{place / PROGRESS} can't be read", (place / PROGRESS).read_text))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(place / PROGRESS), f"can't be read ({error})", "Delete this checkpoint.") from None
    if not isinstance(values, dict) or values.get("step") != int(place.name.removeprefix("step-")):
        raise DataError(str(place / PROGRESS), "is not the progress of this step", "Delete this checkpoint.")
    if (version := values.pop("format_version", None)) != FORMAT_VERSION or not isinstance(values.get(FILES), dict):
        raise DataError(
            str(place / PROGRESS),
            f"was written by another version of this package (checkpoint format {version or 1}, not {FORMAT_VERSION})",
            "Set resume=never, or finish the run with that version.",
        )
    return values


def digest(path: Path) -> str | None:
    """None: it can't be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def sweep(folder: Path) -> None:
    """Remove what a crash left half-written. Folders with other names stay."""
    complete = patiently(f"{folder} can't be read", lambda: complete_steps(folder))
    for step in _steps(folder):
        if step not in complete:
            shutil.rmtree(path_of(folder, step), ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """COMPLETE is removed first, so that a crash in between leaves no folder that seems complete."""
    (path_of(folder, step) / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path_of(folder, step), ignore_errors=True)


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """Silences torch's warning that without a process group it assumes a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class Staging:
    """Copies of a state in the host's memory, which training leaves alone while they are written.

    The memory is kept for the next copy. Of a GPU's tensors it is pinned, which the GPU writes to several times as fast, and all
    are copied before the host waits for one.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Valid until the next call."""
        copies = {name: self._copy(name, value) for name, value in state.items()}
        self._kept = {name: self._kept[name] for name in state}
        if any(value.is_cuda for value in state.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, name: str, value: Tensor) -> Tensor:
        local = (value.to_local() if isinstance(value, DTensor) else value).detach()
        kept = self._kept.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = self._kept[name] = torch.empty_like(
                local, device="cpu", memory_format=torch.contiguous_format, pin_memory=local.is_cuda
            )
        kept.copy_(local, non_blocking=True)
        if not isinstance(value, DTensor):
            return kept
        # The writer reads only ranks from the mesh; the shard itself knows its device.
        return DTensor.from_local(
            kept, value.device_mesh, value.placements, shape=value.shape, stride=value.stride(), run_check=False
        )


def _away(what: str, reason: str) -> RunLost:
    return RunLost(f"{what}: {reason}", "The same command resumes from the newest checkpoint once the storage answers.")


def _raise_interrupt(error: BaseException) -> None:
    """That came while torch wrote or read: it makes an error of its own of it, or one follows as it closes its file."""
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None


NO_SPACE = ("No space left", "Disk quota exceeded", "File too large", "inline_container", " requested and ")
"""In errors of torch, of safetensors and of numpy (its `tofile`: 4096 requested and 512 written), which have no errno."""


def no_space_in(error: BaseException) -> str | None:
    """Whether a full disk (or a limit on file size or quota) caused the error, anywhere in its chain."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cause.strerror
        if any(words in str(cause) for words in NO_SPACE):
            return "no space left"
    return None
