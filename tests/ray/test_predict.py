from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config

pytestmark = pytest.mark.ray


def settings_of(rows: str, output: Path, *settings: str) -> list[str]:
    ours = ["model=tiny_random", f"data.path={rows}", f"output_dir={output}", "predict.max_new_tokens=40", "predict.score=true"]
    return [*ours, "predict.precision=fp32", *settings]


def predicted(rows: str, output: Path, workers: int) -> tuple[bytes, int]:
    """The predictions, by so many actors (0: in this process), and how many were there before."""
    actors = ["resources=local", f"resources.num_workers={workers}", "resources.cpus_per_worker=0.25"] if workers else []
    done = api.predict(load_config("predict", settings_of(rows, output, *actors)))
    return (output / "predictions.jsonl").read_bytes(), done.found


def killed(rows: str, output: Path) -> None:
    """A command that is killed (SIGKILL) after its first answers, and before its last."""
    file = output / "predictions.jsonl"
    command = [sys.executable, "-m", "raytune_llm", "predict", *settings_of(rows, output, "engine.max_rows=2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_each_row_is_answered_once_in_order_by_any_number_of_actors_and_after_a_kill(tmp_path, chat_rows):
    whole, _ = predicted(chat_rows, tmp_path / "inline", 0)
    assert whole.count(b"\n") == 61
    killed(chat_rows, tmp_path / "killed")
    resumed, found = predicted(chat_rows, tmp_path / "killed", 2)
    assert 0 < found < 61 and resumed == whole
    assert predicted(chat_rows, tmp_path / "four", 4) == (whole, 0)
