from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_llm.errors import ConfigError
from raytune_llm.runs import owner
from raytune_llm.runs.owner import LOCK, STALE_AFTER_S, owned

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


def test_the_same_process_is_refused_too(tmp_path: Path):
    with owned(tmp_path), pytest.raises(ConfigError, match="is in use"), owned(tmp_path):
        pass


def test_a_lock_of_another_host_is_free_when_its_time_is_old(tmp_path: Path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": "x"}))
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), owned(tmp_path):
        pass
    old = time.time() - STALE_AFTER_S - 1
    os.utime(lock, (old, old))
    with owned(tmp_path):
        pass


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
        until = time.monotonic() + 5
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0
