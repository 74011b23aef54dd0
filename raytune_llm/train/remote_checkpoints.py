"""Checkpoints in an object store. The files of a step are uploaded first, then progress.json, then COMPLETE.

Each machine has a local folder with the files that it wrote or downloaded. A file in it is used if its hash matches
progress.json; otherwise it is downloaded, once per machine.
"""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raytune_llm.errors import DataError, ResourceError, RunLost
from raytune_llm.file_hash import sha256_of
from raytune_llm.object_store import RemoteFolder
from raytune_llm.train.checkpoint_files import (
    COMPLETE,
    FILES,
    PROGRESS,
    STEP,
    begin,
    digest,
    mark_complete,
    newest_of,
    path_of,
    read_document,
    remove,
)


class RemoteCheckpoints:
    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        """folder: this machine's local folder."""
        self._remote, self._folder = remote, folder
        self._name = uuid.uuid4().hex
        """A random name of this writer, by which it recognizes a COMPLETE that it wrote."""

    def __str__(self) -> str:
        return self._remote.address

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        marks = (name.split("/") for name in self._remote.files())
        return sorted(int(found[1]) for step, *rest in marks if rest == [COMPLETE] and (found := STEP.fullmatch(step)))

    def sweep(self) -> None:
        """Remove incomplete checkpoints that a crash left."""
        complete = {f"step-{step}" for step in self.complete_steps()}
        for folder in {name.split("/")[0] for name in self._remote.files()}:
            if STEP.fullmatch(folder) and folder not in complete:
                self._remote.remove(folder)

    def newest_sound(self) -> int | None:
        """Download the newest intact checkpoint and return its step; None if there is none. Raises DataError if all are
        damaged."""
        steps = self.complete_steps()
        self.keep_here(steps)
        return newest_of(str(self), steps, self.fetch)

    def fetch(self, step: int, *, checked: bool = False) -> str | None:
        """Download the files of a checkpoint that this machine lacks. Returns what is wrong with them, or None.

        checked: another process has compared the hashes, so that each machine compares them only once.
        """
        place, name = path_of(self._folder, step), f"step-{step}"
        with self._one_process_of_this_machine():
            try:
                self._remote.download([f"{name}/{PROGRESS}"], self._folder)
                seen = sha256_of(place / PROGRESS)
                if checked and _text(place / COMPLETE) == seen:
                    return None
                hashes = read_document(place)[FILES]
                lacking = [file for file, known in hashes.items() if digest(place / "state" / file) != known]
                self._remote.download([f"{name}/state/{file}" for file in lacking], self._folder)
            except FileNotFoundError as error:
                return f"a file is missing in the store ({error})"
            except DataError as error:
                return error.problem
            for file in lacking:
                if digest(place / "state" / file) != hashes[file]:
                    return f"{file} has other bytes than were written"
            (place / COMPLETE).write_text(seen)
        return None

    def keep(self, step: int, files: Sequence[Path]) -> None:
        """Upload the files of the state that this worker wrote."""
        self._remote.upload(self._folder, [f"step-{step}/state/{path.name}" for path in files])

    def begin(self, step: int) -> None:
        self.remove(step)
        begin(self._folder, step)

    def complete(self, step: int) -> None:
        """Upload progress.json, then create COMPLETE. Called after all files of the state are uploaded.

        Raises RunLost if another process has completed the same checkpoint.
        """
        mark_complete(self._folder, step)
        self._remote.upload(self._folder, [f"step-{step}/{PROGRESS}"])
        if not self._remote.create(f"step-{step}/{COMPLETE}", self._name.encode()):
            what = f"another process has written the checkpoint step-{step} in {self._remote.address}"
            raise RunLost(what, "End one of the two; the same command resumes.")

    def remove(self, step: int) -> None:
        """Delete a checkpoint here and in the store, COMPLETE first."""
        remove(self._folder, step)
        self._remote.remove(f"step-{step}/{COMPLETE}")
        self._remote.remove(f"step-{step}")

    def discard(self, step: int) -> None:
        """Like `remove`, but errors are ignored, since something has failed already. What stays has no COMPLETE, so the next
        start removes it."""
        try:
            self.remove(step)
        except (OSError, ResourceError):
            return

    def keep_here(self, steps: Sequence[int]) -> None:
        """Remove the local files of all other steps."""
        for place in self._folder.glob("step-*"):
            if (found := STEP.fullmatch(place.name)) and int(found[1]) not in steps:
                shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def _one_process_of_this_machine(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".fetching").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
