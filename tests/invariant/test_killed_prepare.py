"""Preparing that was killed resumes from its finished shards, and writes the same store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_llm import ResourceError, api, load_config
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.text import TextRow
from raytune_llm.data.store import write_shard
from tests.limits import no_file_larger_than


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Some MB, so several chunks."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(9000):
            turns = [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": "word " * (number % 200)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def shards(cache: Path) -> dict[str, int]:
    """Finished ones, with the time at which each was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*/shard-*.arrow")}


def test_finished_shards_outlive_a_kill(rows: Path, tmp_path: Path) -> None:
    def settings(cache: str) -> list[str]:
        return ["model=tiny_random", f"data.path={rows}", f"data.cache={tmp_path / cache}", "resources=inline"]

    command = [sys.executable, "-m", "raytune_llm", "prepare", *settings("killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while len(shards(tmp_path / "killed")) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    finished = shards(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*/manifest.json"))
    again = api.prepare(load_config("prepare", settings("killed"))).store
    whole = api.prepare(load_config("prepare", settings("whole"))).store
    assert 2 <= len(finished) < len(whole.manifest["shards"])
    assert again.manifest == whole.manifest
    again.verify()
    assert finished.items() <= shards(tmp_path / "killed").items()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    said = r"can't be written .*are free.*data\.cache"
    with no_file_larger_than(100_000), pytest.raises(ResourceError, match=said):
        write_shard(tmp_path / "shard", [TextRow(range(1000))] * 1000, Dropped(), kind=KINDS["text"])
    assert not list(tmp_path.iterdir())
