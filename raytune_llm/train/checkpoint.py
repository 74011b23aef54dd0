"""Checkpoints: `checkpoints/step-<n>/` with the training state, progress.json, and COMPLETE written last.

progress.json holds a hash of every file of the state, and one of itself. If a checkpoint's files no longer match, it is skipped
with a message, and the run resumes from the one before it.

The state is in torch's distributed checkpoint format: each worker writes its part, and a reader of any world size or strategy
reads what it needs. A folder without COMPLETE is never read, and is removed at the next start. remote_checkpoints.py keeps
checkpoints in an object store.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from raytune_llm.byte_size import in_units
from raytune_llm.errors import DataError, ResourceError, RunLost
from raytune_llm.storage import away_in, causes, no_access_in, no_space_in, patient
from raytune_llm.train import checkpoint_files
from raytune_llm.train.checkpoint_files import path_of, write_document
from raytune_llm.train.checkpoint_writer import StateWriter
from raytune_llm.train.progress import Progress
from raytune_llm.train.staging import Staging, local_of


class Place(Protocol):
    """Where the checkpoints of a run are kept: a folder that all workers share, or an object store (remote_checkpoints.py)."""

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        ...

    def newest_sound(self) -> int | None:
        """Find the newest intact checkpoint and bring its files to this machine; None if there is none. Raises DataError if all
        are damaged."""
        ...

    def fetch(self, step: int, *, checked: bool = False) -> str | None:
        """Bring a checkpoint's files to this machine. Returns what is wrong with them, or None. checked: rank 0 has compared the
        hashes already."""
        ...

    def keep(self, step: int, files: Sequence[Path]) -> None:
        """Store the files of a new checkpoint's state that this worker wrote."""
        ...

    def begin(self, step: int) -> None:
        """Create an empty folder for a checkpoint. Called on rank 0."""
        ...

    def complete(self, step: int) -> None:
        """Mark the checkpoint as complete. Called on rank 0, after all files are kept."""
        ...

    def remove(self, step: int) -> None: ...

    def discard(self, step: int) -> None:
        """Like `remove`, but raises nothing; it is called after a failure."""
        ...

    def keep_here(self, steps: Sequence[int]) -> None:
        """Remove this machine's own copies of all other steps."""
        ...


class SharedFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def complete_steps(self) -> list[int]:
        return checkpoint_files.complete_steps(self._folder)

    def newest_sound(self) -> int | None:
        return checkpoint_files.newest_sound(self._folder)

    def fetch(self, step: int, *, checked: bool = False) -> str | None:
        return None

    def keep(self, step: int, files: Sequence[Path]) -> None:
        return

    def begin(self, step: int) -> None:
        checkpoint_files.begin(self._folder, step)

    def complete(self, step: int) -> None:
        checkpoint_files.mark_complete(self._folder, step)

    def remove(self, step: int) -> None:
        checkpoint_files.remove(self._folder, step)

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

        place: where they are kept; None: in `folder`. With an object store, `folder` is this machine's part.
        """
        self.folder, self.keep, self.keep_best, self._place = folder, keep, keep_best, place or SharedFolder(folder)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._background: Future[None] | None = None
        self._staging, self._reserved = Staging(), False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        # The background writer has its own process group, so that its collectives don't interleave with training's.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def reserve(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take the host memory in which GPUs' states like this one are staged, once and in the background, so that the first
        `save` need not wait for it."""
        if self._reserved or self._pool is None or not torch.cuda.is_available():
            return
        local = {name: local_of(value) for name, value in state().items()}
        like = {name: torch.empty_like(value, device="meta") for name, value in local.items() if value.is_cuda}
        self._reserved, self._background = True, self._pool.submit(self._staging.reserve, like)

    def save(self, state: Mapping[str, Tensor], progress: Progress, identity: Mapping[str, str]) -> None:
        """Save a checkpoint; collective over all workers. identity: hashes that a run must share with this one to resume it.

        What changes the state afterwards calls `hold` first.
        """
        self._staging.stop_reserving()
        self.wait()
        document = {**asdict(progress), **identity}
        if self._pool is None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the writer's threads have streams of their own
            self._write(dict(state), progress.step, progress.best_step, document)
        else:
            staged = self._staging.copy(state)
            self._background = self._pool.submit(self._write, staged, progress.step, progress.best_step, document)

    def newest(self) -> int | None:
        """The step of the newest intact checkpoint, which rank 0 finds; its files are brought to this machine. Collective over
        all workers."""
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
        """Bring the missing files of a checkpoint that rank 0 found intact to this machine."""
        if (problem := self._place.fetch(step, checked=True)) is not None:
            raise DataError(f"{self._place}/step-{step}", problem, "Repeat the command; it resumes from an older checkpoint.")

    def hold(self) -> None:
        """Let the GPU change nothing of the state before it is staged."""
        self._staging.hold()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. Raises the writer's error."""
        if self._background is not None:
            background, self._background = self._background, None
            background.result()

    def close(self) -> None:
        self._staging.stop_reserving()
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)  # gloo's threads would keep polling for it

    def load(self, step: int, fill: Callable[[Mapping[str, Tensor], Callable[[dict[str, Tensor]], None]], None]) -> None:
        """Load a checkpoint. fill: the strategy's `load`, called with what the checkpoint holds and a function that reads it."""
        folder = path_of(self.folder, step) / "state"
        self._fetch(step)
        try:
            entries = _read_metadata(folder).state_dict_metadata
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
            try:
                _read_state(folder, state, self._group)
            except CheckpointException as error:
                _raise_interrupt(error)
                if (away := away_in(error)) is not None:
                    raise _away(f"{folder} can't be read", away) from error
                raise

        fill(kept, read)

    def _write(self, state: dict[str, Tensor], step: int, best_step: int | None, document: Mapping[str, Any]) -> None:
        what = f"checkpoint step-{step} can't be written to {self.folder}"
        try:
            self._staging.wait()
            if self.rank == 0:
                self._place.begin(step)
            if self._group is not None:
                dist.barrier(self._group)
            folder = path_of(self.folder, step) / "state"
            written = _write_state(folder, state, self._group)
            self._place.keep(step, [folder / name for name in written])
            hashes = self._of_all(written)
            if self.rank == 0:
                write_document(self.folder, step, document, hashes)
                self._place.complete(step)
                self._prune(step, best_step)
            self._place.keep_here([step])
        except RunLost:
            raise  # the storage does not answer, or the checkpoint is another process's: don't remove anything
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
            if no_access := no_access_in(error, self.folder):
                fix = "Make it a folder that can be written; repeating the command resumes from the newest checkpoint."
                raise ResourceError(f"{what}: {no_access}", fix) from error
            raise

    def _of_all(self, mine: dict[str, str]) -> dict[str, str]:
        """The hashes of all workers' files. Collective over all workers, after all have kept their files."""
        if self._group is None:
            return mine
        found: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(found, mine, group=self._group)
        return {name: digest for part in found for name, digest in part.items()}

    def _prune(self, newest: int, best: int | None) -> None:
        for step in self._place.complete_steps()[: -self.keep]:
            if step != newest and not (self.keep_best and step == best):
                self._place.remove(step)


@patient("can't be written")
def _write_state(folder: Path, state: dict[str, Tensor], group: Any) -> dict[str, str]:
    """Write the state, and return the hashes of the files that this worker wrote. Collective over the group. torch reports one
    worker's failure to all, so that all retry together."""
    device = next((local.device for value in state.values() if (local := local_of(value)).is_cuda), None)
    with one_process_is_meant():
        writer = StateWriter(folder, device)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.hashes


@patient("can't be read")
def _read_state(folder: Path, state: dict[str, Tensor], group: Any) -> None:
    """Read into the tensors of `state`. Collective over the group, as `_write_state` is."""
    with one_process_is_meant():
        dcp.load(state, storage_reader=FileSystemReader(folder), process_group=group, no_dist=group is None)


@patient("can't be read")
def _read_metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


@contextmanager
def one_process_is_meant() -> Iterator[None]:
    """Silences torch's warning that without a process group it assumes a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _away(what: str, reason: str) -> RunLost:
    return RunLost(f"{what}: {reason}", "The same command resumes from the newest checkpoint once the storage answers.")


def _raise_interrupt(error: BaseException) -> None:
    """Raise the KeyboardInterrupt in an error's chain, if there is one. torch wraps an interrupt that comes while it reads or
    writes in an error of its own, or fails afterwards when it closes its file."""
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
