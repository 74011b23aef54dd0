from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytune_llm import storage
from raytune_llm.errors import DataError, ResourceError, RunLost
from raytune_llm.train import checkpoint, checkpoint_files
from raytune_llm.train.checkpoint import Checkpoints, _raise_interrupt
from raytune_llm.train.checkpoint_files import METADATA, PROGRESS, complete_steps, newest_sound, path_of, read_progress, sweep
from raytune_llm.train.checkpoint_writer import StateWriter
from raytune_llm.train.progress import Progress
from raytune_llm.train.staging import Staging

STATE = {"parameters.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, keep=2, asynchronous=False)
    yield made
    made.close()


def test_what_is_saved_comes_back(checkpoints, tmp_path):
    progress = Progress(step=3, epoch=1, cursor=7, source_state={"asked": 2}, enricher_states=[None, [0.5, 2.0]])
    checkpoints.save(STATE, progress, {"settings": "{}"})
    assert read_progress(tmp_path, 3) == (progress, {"settings": "{}"})
    read_back = {"parameters.weight": torch.zeros(2, 3)}
    checkpoints.load(3, lambda sizes, read: read(read_back))
    assert torch.equal(read_back["parameters.weight"], STATE["parameters.weight"])


def test_whatever_byte_of_the_progress_changes_the_checkpoint_is_passed_over(checkpoints, tmp_path):
    for step in (2, 4):
        checkpoints.save(STATE, Progress(step=step, epoch=1, cursor=7, loss_last=0.25), {"settings": '{"a": 1}'})
    path = path_of(tmp_path, 4) / PROGRESS
    content, there = path.read_bytes(), read_progress(tmp_path, 4)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :])
        assert newest_sound(tmp_path) == 2 or read_progress(tmp_path, 4) == there, place


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(tmp_path, monkeypatch):
    """With keep=1 a power cut would else leave none: what is removed may reach the disk before what was written."""
    done: list[str] = []
    sizes: dict[str, int] = {}
    fsync, rmtree = os.fsync, shutil.rmtree

    def flush(file: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        sizes[done[-1]] = os.fstat(file).st_size
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **settings: done.append(f"removed {path}") or rmtree(path, **settings))
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    checkpoints.save(STATE, Progress(step=2), {})
    done.clear()
    checkpoints.save(STATE, Progress(step=4), {})
    new = path_of(tmp_path, 4)
    names = [name.replace(f".{PROGRESS}.{os.getpid()}.partial", PROGRESS) for name in done]
    before = names[: names.index(f"removed {path_of(tmp_path, 2)}")]
    files = {str(path).replace(".metadata", ".metadata.tmp"): path.stat().st_size for path in (new / "state").iterdir()}
    assert {name: sizes[name] for name in files} == files, "all of each file, and nothing of it is still in Python's buffer"
    assert {*files, f"{new / PROGRESS}", f"{new / 'state'}", f"{new}", f"{tmp_path}"} <= {*before}


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda folder: shutil.rmtree(folder.parent.parent), r"step-4/state was removed"),
        (lambda folder: read_only(folder), r"state/__0_0.distcp: Read-only file system"),
    ],
)
def test_a_folder_that_is_removed_or_becomes_read_only_is_named(checkpoints, tmp_path, monkeypatch, fails, said):
    checkpoints.save(STATE, Progress(step=2), {})

    class Fails(StateWriter):
        def write_data(self, *arguments: Any, **settings: Any) -> Any:
            fails(Path(self.path))
            return super().write_data(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "StateWriter", Fails)
        with pytest.raises(
            ResourceError, match=rf"checkpoint step-4 can't be written to .*{said}.*repeating the command resumes"
        ):
            checkpoints.save(STATE, Progress(step=4), {})
    checkpoints.save(STATE, Progress(step=4), {})
    assert newest_sound(tmp_path) == 4


def read_only(folder: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / "__0_0.distcp"))


def test_the_newest_stay(checkpoints, tmp_path):
    for step in (2, 4, 6):
        checkpoints.save(STATE, Progress(step=step), {})
    assert complete_steps(tmp_path) == [4, 6]


def test_what_was_not_finished_is_swept_away(checkpoints, tmp_path):
    checkpoints.save(STATE, Progress(step=2), {})
    path_of(tmp_path, 4).mkdir()
    sweep(tmp_path)
    assert not path_of(tmp_path, 4).exists() and newest_sound(tmp_path) == 2


def test_a_checkpoint_of_the_format_before_is_read_though_its_progress_has_no_hash(checkpoints, tmp_path):
    checkpoints.save(STATE, Progress(step=2, cursor=7), {"settings": "{}"})
    path = path_of(tmp_path, 2) / PROGRESS
    values = json.loads(path.read_text()) | {"format_version": checkpoint_files.UNHASHED}
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="other bytes than were written"):  # a changed digit of the version
        read_progress(tmp_path, 2)
    del values[checkpoint_files.CONTENT]
    path.write_text(json.dumps(values))
    assert newest_sound(tmp_path) == 2 and read_progress(tmp_path, 2) == (Progress(step=2, cursor=7), {"settings": "{}"})
    (path.parent / "state" / METADATA).write_bytes(b"")
    with pytest.raises(DataError, match="other bytes than were written"):
        newest_sound(tmp_path)


@pytest.mark.parametrize("version", [None, 1, 99])
def test_a_checkpoint_of_another_format_is_refused(checkpoints, tmp_path, version):
    checkpoints.save(STATE, Progress(step=2), {})
    path = path_of(tmp_path, 2) / PROGRESS
    values = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(DataError, match="was written by another version of this package"):
        read_progress(tmp_path, 2)
    with pytest.raises(DataError, match=r"can't be used .*another version.*Set resume=never"):
        newest_sound(tmp_path)


class AwayFor(StateWriter):
    """Of torch's writer, fails so often, as a network file system whose server starts again."""

    left = 0

    def write_data(self, *arguments: Any, **settings: Any) -> Any:
        if AwayFor.left:
            AwayFor.left -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().write_data(*arguments, **settings)


def touch_that_fails(times: int) -> Callable[[Path], None]:
    touch, left = Path.touch, [times]

    def touched(path: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(path)

    return touched


def save_while_away(folder: Path, times: int) -> None:
    """On rank 1, where there are two, or here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PAUSES_S", (0.0,) * 4)
        patch.setattr(checkpoint, "StateWriter", AwayFor)
        patch.setattr(Path, "touch", touch_that_fails(min(times, 4)))
        checkpoints = Checkpoints(folder, keep=2, asynchronous=False)
        AwayFor.left = times if not dist.is_initialized() or dist.get_rank() == 1 else 0
        try:
            checkpoints.save(STATE, Progress(step=2), {})
        finally:
            checkpoints.close()


def test_a_checkpoint_is_written_once_the_file_system_is_back(tmp_path):
    save_while_away(tmp_path, 3)
    assert newest_sound(tmp_path) == 2


def test_a_file_system_that_stays_away_loses_the_run_and_nothing_is_removed(tmp_path, checkpoints):
    checkpoints.save(STATE, Progress(step=1), {})
    with pytest.raises(RunLost, match=r"checkpoint step-2 can't be written to .*Input/output error"):
        save_while_away(tmp_path, 9)
    assert path_of(tmp_path, 2).exists() and newest_sound(tmp_path) == 1


def save_in_a_group(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        save_while_away(folder / "kept", 3)
        with pytest.raises(RunLost):
            save_while_away(folder / "lost", 9)
    finally:
        dist.destroy_process_group()


def test_workers_write_again_together_though_the_file_system_is_away_for_one_of_them(tmp_path):
    torch.multiprocessing.spawn(save_in_a_group, (tmp_path,), nprocs=2)
    assert newest_sound(tmp_path / "kept") == 2 and newest_sound(tmp_path / "lost") is None


def test_a_folder_that_does_not_answer_is_not_taken_for_one_without_checkpoints(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(STATE, Progress(step=2), {})
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,))
    left = [2]

    def listdir(folder: Path) -> list[str]:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return os.listdir(folder)

    monkeypatch.setattr(checkpoint_files, "os", SimpleNamespace(listdir=listdir))
    with pytest.raises(OSError, match="Input/output"):
        newest_sound(tmp_path)
    left[0] = 1
    sweep(tmp_path)
    left[0] = 1
    assert newest_sound(tmp_path) == 2
    assert complete_steps(tmp_path / "none") == [] == complete_steps(path_of(tmp_path, 2) / PROGRESS)


def test_what_is_staged_is_a_copy_in_memory_that_is_used_again():
    staging = Staging()
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "step": torch.tensor(3)}
    first = staging.copy(state)
    state["a"] += 1
    assert first["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and first["a"].is_contiguous() and first["step"] == 3
    place = first["a"].data_ptr()
    again = staging.copy(state)
    assert again["a"].data_ptr() == place and again["a"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert staging.copy({"a": torch.zeros(5, dtype=torch.bfloat16)})["a"].dtype == torch.bfloat16


def test_an_interrupt_while_torch_writes_is_one_though_torch_fails_to_close_its_file():
    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)

    with pytest.raises(RuntimeError, match="inline_container") as caught:
        torch.save({"a": torch.zeros(1000)}, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        _raise_interrupt(caught.value)
    _raise_interrupt(OSError(28, "No space left on device"))  # is none
