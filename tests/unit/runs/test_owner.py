from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_llm.errors import ConfigError, ResourceError, RunLost
from raytune_llm.interrupts import sigterm_raises
from raytune_llm.runs import owner
from raytune_llm.runs.owner import LOCK, STALE_AFTER_S, owned
from raytune_llm.runs.remote_output import check_writable
from tests.limits import no_file_larger_than

HOLD = """
import sys, time
from pathlib import Path
from raytune_llm.runs.owner import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is in use by process {holder.pid}"), owned(tmp_path):
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a zombie
    with owned(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    holder.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a namespace of process ids needs root")
def test_a_process_of_another_container_on_this_host_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    often = HOLD.replace("with owned", "from raytune_llm.runs import owner\nowner.RENEWED_EVERY_S = 2.0\nwith owned")
    contained = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", often, str(tmp_path)]
    holder = subprocess.Popen(contained, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    monkeypatch.setattr(owner, "LOOK_EVERY_S", 0.2)
    with pytest.raises(ConfigError, match="is in use by process 1 on"), owned(tmp_path):
        pass
    holder.kill()
    holder.wait()


def test_the_same_process_is_refused_too(tmp_path: Path):
    with owned(tmp_path), pytest.raises(ConfigError, match="is in use"), owned(tmp_path):
        pass


ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}


class LockElsewhere:
    """A lock of another host, whose age is known each time that it is looked at."""

    place = "/shared/o"

    def __init__(self, *ages: float) -> None:
        self.ages, self.text = list(ages), json.dumps(ELSEWHERE)

    def create(self, text: str) -> bool:
        return False

    def read(self) -> str:
        return self.text

    def replace(self, text: str) -> None:
        self.text = text

    def renew(self, text: str) -> None:
        raise AssertionError

    def remove(self) -> None:
        raise AssertionError

    def age_s(self) -> float:
        return self.ages.pop(0)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(owner, "TAKEN_AFTER_S", 0.0)


def test_a_lock_of_another_host_is_taken_once_its_owner_has_not_renewed_it_for_a_while(
    at_once: None, caplog: pytest.LogCaptureFixture
):
    assert STALE_AFTER_S <= 25, "a run that is started again elsewhere may have to wait for so long"
    lock, mine = LockElsewhere(2, 2, 8, STALE_AFTER_S - 0.1, STALE_AFTER_S + 1), owner._new_lock()
    owner._take(lock, mine)
    assert json.loads(lock.text) == mine and not lock.ages
    assert "/shared/o was in use by process 1 on elsewhere a moment ago; checking for up to 18 s" in caplog.text


def test_a_lock_of_another_host_that_is_renewed_is_refused(at_once: None):
    lock = LockElsewhere(3, 4, 5, 0.4)
    with pytest.raises(ConfigError, match="process 1 on elsewhere"):
        owner._take(lock, owner._new_lock())
    assert json.loads(lock.text) == ELSEWHERE and not lock.ages


def test_an_old_lock_of_another_host_is_free_at_once(tmp_path: Path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps(ELSEWHERE))
    old = time.time() - STALE_AFTER_S - 1
    os.utime(lock, (old, old))
    with owned(tmp_path):
        pass


def wait_for(seen: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not seen() and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("in_background", [False, True])
def test_an_owner_whose_folder_another_host_took_ends_as_one_that_can_be_started_again(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A script's shell lets commands in the background ignore SIGINT."""
    monkeypatch.setattr(owner, "RENEWED_EVERY_S", 0.02)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    done = []

    def work() -> None:
        with owned(tmp_path):
            (tmp_path / LOCK).write_text(json.dumps(ELSEWHERE))
            wait_for(lambda: False)
            done.append("more work")

    try:
        with sigterm_raises(), pytest.raises(RunLost, match="process 1 on elsewhere has taken") as lost:
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not done, "it ends in the middle"
    assert lost.value.exit_code == 1
    assert json.loads((tmp_path / LOCK).read_text()) == ELSEWHERE, "it is the other's"


def test_an_owner_in_a_thread_hears_of_it_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, "RENEWED_EVERY_S", 0.02)
    raised: list[BaseException] = []

    def own() -> None:
        try:
            with owned(tmp_path) as ownership:
                (tmp_path / LOCK).write_text(json.dumps(ELSEWHERE))
                wait_for(lambda: ownership.lost)
        except RunLost as error:
            raised.append(error)

    thread = threading.Thread(target=own)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_a_lock_that_can_not_be_read_for_a_moment_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, "RENEWED_EVERY_S", 0.02)
    with owned(tmp_path):
        lock = tmp_path / LOCK
        content = lock.read_text()
        lock.write_text("")
        time.sleep(0.1)
        lock.write_text(content)
        os.utime(lock, (0, 0))
        wait_for(lambda: lock.stat().st_mtime > 0)
        assert lock.stat().st_mtime > 0, "it is renewed again"


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_broken_lock_is_free_when_its_time_is_old(tmp_path: Path, content: str):
    lock = tmp_path / LOCK
    lock.write_text(content)
    old = time.time() - STALE_AFTER_S - 1
    os.utime(lock, (old, old))
    with owned(tmp_path):
        pass


def test_the_lock_s_time_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, "RENEWED_EVERY_S", 0.02)
    with owned(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        wait_for(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_a_lock_of_the_future_is_watched_no_longer_than_one_of_now(at_once: None, monkeypatch: pytest.MonkeyPatch):
    """The clock was set back by a day after its owner died."""
    monkeypatch.setattr(owner, "STALE_AFTER_S", 0.2)
    lock, mine = LockElsewhere(*[-86400.0] * 1000), owner._new_lock()
    monkeypatch.setattr(owner, "LOOK_EVERY_S", 0.01)
    owner._take(lock, mine)
    assert json.loads(lock.text) == mine


def test_a_full_disk_is_named_and_leaves_no_lock(tmp_path: Path):
    with no_file_larger_than(0), pytest.raises(ResourceError, match=r"o can't be written: .* are free\)\. Free some space"):
        with owned(tmp_path / "o"):
            pass
    assert not (tmp_path / "o").exists()
    with owned(tmp_path / "o"):
        pass


@pytest.mark.parametrize("name", ["checkpoints", "final"])
def test_a_file_where_a_run_writes_a_folder_is_refused_and_stays(name: str, tmp_path: Path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"output_dir must be a folder where the folder {name} can be written"):
        check_writable(str(tmp_path))
    assert (tmp_path / name).read_text() == "mine"
