"""An output folder in an object store (output_dir=s3://bucket/folder).

Each machine of the run works in a local folder and uploads to the store: checkpoints, metrics and samples at each checkpoint,
`final/` when the run has written it, and the driver's files (settings, summary, TensorBoard's files) at the end. A run can be
resumed on any machine from the store.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune_llm import object_store
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.finished import FINAL, FINISHED, files_of
from raytune_llm.object_store import RemoteFolder, is_address
from raytune_llm.packaged import cache_dir
from raytune_llm.report import trackers
from raytune_llm.report.metrics import METRICS, SAMPLES
from raytune_llm.runs import owner
from raytune_llm.train.checkpoint_files import complete_steps, digest
from raytune_llm.train.remote_checkpoints import RemoteCheckpoints

CHECKPOINTS = "checkpoints"
FILES = ("run.yaml", METRICS, SAMPLES, "summary.json", "loss.png", FINISHED)
"""Files that a run writes to its output folder."""
BY_WORKERS = (METRICS, SAMPLES, "scores.jsonl", "scores.png", FINAL, "profile")
"""Files and folders that the worker with rank 0 writes."""
FOLDERS = (CHECKPOINTS, FINAL, "profile", "tensorboard")
"""Folders that a run writes there."""
OWN = {*FILES, *BY_WORKERS, *trackers.FILES}
"""All that a run writes but checkpoints. Whatever else is in the store's folder, such as another run, is not touched."""


def work_folder(output_dir: str) -> Path:
    """The folder in which a run writes on this machine: output_dir, or a folder in the cache if that is in an object store."""
    if not is_address(output_dir):
        return Path(output_dir)
    return cache_dir() / "outputs" / hashlib.sha256(output_dir.rstrip("/").encode()).hexdigest()[:16]


def remote_folder(output_dir: str) -> RemoteFolder | None:
    """The output folder in the object store; None if it is on a file system."""
    return RemoteFolder(output_dir) if is_address(output_dir) else None


def check_writable(output_dir: str) -> None:
    """Raises ConfigError or ResourceError if a run could not write there."""
    try:
        owner.check_writable(work_folder(output_dir), *FILES, folders=FOLDERS)
    except ConfigError as error:
        if not is_address(output_dir):
            raise
        lacking = f"this machine's copy of {output_dir} {error.rule}, {error.got}"
        raise ResourceError(lacking, "Let XDG_CACHE_HOME name a folder that can be written.") from None
    if is_address(output_dir):
        object_store.check_writable(output_dir, "output_dir")


@contextmanager
def owned(output_dir: str, *, anew: bool, notify: Callable[[str], None]) -> Iterator[Path]:
    """Own the output folder inside the block. Yields the local folder. For an object store, the run's files are downloaded to it
    first, and uploaded at the end, even after an error.

    anew: take over nothing of an earlier run (resume=never). It stays in the store until `clear`, as the command may be refused.
    """
    folder, remote = work_folder(output_dir), remote_folder(output_dir)
    with owner.owned(folder):
        if remote is None:
            yield folder
            return
        with owner.owned_remotely(remote) as ownership:
            pull(remote, folder, anew=anew)
            try:
                yield folder
            except BaseException:
                if not ownership.lost:
                    with suppress(OSError, ResourceError):
                        push(remote, folder)
                raise
            if ownership.lost:
                return
            push(remote, folder)
            notify(f"{remote.address} has all of the run; a copy is in {folder}")


def saved_steps(output_dir: str) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    folder, remote = work_folder(output_dir) / CHECKPOINTS, remote_folder(output_dir)
    return complete_steps(folder) if remote is None else RemoteCheckpoints(remote / CHECKPOINTS, folder).complete_steps()


def pull(remote: RemoteFolder, folder: Path, *, anew: bool = False) -> None:
    """Download the run's files to the local folder: of checkpoints the newest intact one, and `final/` if it is complete, or all
    that is left of a run. anew: download nothing, and remove the copies here."""
    checkpoints = RemoteCheckpoints(remote / CHECKPOINTS, folder / CHECKPOINTS)
    if not anew:
        checkpoints.sweep()
    names = [] if anew else [name for name in remote.files() if name.split("/")[0] in OWN]
    for path in local_files(folder):
        if path not in names:
            (folder / path).unlink()
    if anew:
        checkpoints.keep_here([])
        return
    remote.download([name for name in names if not name.startswith(f"{FINAL}/")], folder)
    hashes = files_of(folder)
    if hashes or not checkpoints.complete_steps():
        final = [name for name in names if name.startswith(f"{FINAL}/")]
        remote.download([name for name in final if (here := digest(folder / name)) is None or here != hashes.get(name)], folder)
    else:
        shutil.rmtree(folder / FINAL, ignore_errors=True)
    checkpoints.newest_sound()


def clear(output_dir: str) -> None:
    """Remove what an earlier run left in an object store. Called when a run with resume=never begins; of a folder,
    `output.open_output` removes it."""
    if (remote := remote_folder(output_dir)) is not None:
        for name in {name.split("/")[0] for name in remote.files()} & {*OWN, CHECKPOINTS}:
            remote.remove(name)


def push(remote: RemoteFolder, folder: Path) -> None:
    """Upload the driver's files. finished.json, which marks the run as complete, is the last."""
    mine = [name for name in local_files(folder) if name.split("/")[0] not in BY_WORKERS]
    remote.upload(folder, [name for name in mine if name != FINISHED])
    if FINISHED in mine:
        remote.upload(folder, [FINISHED])


def push_records(remote: RemoteFolder, folder: Path) -> None:
    """Upload the records of the worker with rank 0. Called before a checkpoint."""
    remote.upload(folder, [name for name in (METRICS, SAMPLES) if (folder / name).exists()])


def pull_records(remote: RemoteFolder, folder: Path) -> None:
    """Download the records to the machine of rank 0, which appends to them; another machine may have written them."""
    remote.download([name for name in (METRICS, SAMPLES) if name in remote.files()], folder)


def push_results(remote: RemoteFolder, folder: Path) -> None:
    """Upload all files of the worker with rank 0. Called after its last step."""
    remote.remove(FINAL)
    remote.upload(folder, [name for name in local_files(folder) if name.split("/")[0] in BY_WORKERS])


def collect(remote: RemoteFolder, folder: Path) -> None:
    """Download the files of the worker with rank 0 to the driver's machine."""
    shutil.rmtree(folder / FINAL, ignore_errors=True)
    remote.download([name for name in remote.files() if name.split("/")[0] in BY_WORKERS], folder)


def local_files(folder: Path) -> list[str]:
    """Names of the run's files, without checkpoints and without hidden files such as the lock."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if path.parts[0] != CHECKPOINTS and not path.parts[0].startswith(".")]
