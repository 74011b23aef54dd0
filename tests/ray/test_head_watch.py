"""A command whose head is killed ends with a line of its own, and without Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray.head import head_to_kill, kill
from tests.ray.test_prepare import write_rows

pytestmark = [pytest.mark.ray, pytest.mark.long]
IMPATIENT = "from raytune_llm import __main__, head_watch; head_watch.PATIENCE_S = 3.0; __main__.main()"


def test_rows_that_are_prepared_when_the_head_dies(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40_000)
    settings = ["prepare", "model=tiny_random", f"data.path={rows}", f"data.cache={tmp_path / 'cache'}", "data.max_length=2048"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with head_to_kill() as (address, head):
        command = [sys.executable, "-c", IMPATIENT, *settings, "resources=cluster", f"resources.address={address}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as driver:
            try:
                while not list(tmp_path.glob("cache/**/shard-*")):
                    assert driver.poll() is None, driver.communicate()
                    time.sleep(0.05)
                kill(head)
                said, _ = driver.communicate(timeout=120)
            finally:
                driver.kill()
    assert driver.returncode == 1, said
    line = (
        f"error: Ray lost the run: its head does not answer at {address}. The same command resumes from the finished shards, once"
    )
    assert line in said and "rpc_client" not in said and "Traceback" not in said, said
