"""Ctrl-C and SIGTERM end a run alike: a line that says what the same command does next, and the shell's exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_llm.commands.train import how_to_resume

COMMAND = [
    "model=tiny_random", "resources=inline", "tracking=none", "train.epochs=5000", "checkpoint.every_steps=1",
    "train.log_every_steps=1", "train.global_batch_size=1", "data.max_length=128", "data.eval_fraction=0",
]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_says_how_to_resume(number: int, code: int, chat_rows: str, cache: str, tmp_path: Path) -> None:
    overrides = [*COMMAND, f"data.path={chat_rows}", f"data.cache={cache}", f"output_dir={tmp_path / 'o'}"]
    running = subprocess.Popen(
        [sys.executable, "-m", "raytune_llm", *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("o/checkpoints/step-*/COMPLETE")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    word = "interrupted" if code == 130 else "terminated"
    assert running.returncode == code, said
    assert f"{word}; the same command resumes from the checkpoint at step " in said
    assert "Traceback" not in said and "stack" not in said.lower()


def test_before_anything_was_saved_no_checkpoint_is_spoken_of(tmp_path: Path) -> None:
    assert how_to_resume(tmp_path) == "nothing was saved yet: the same command begins again"
    for step in (5, 20, 9):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step}/COMPLETE").touch()
    (tmp_path / "checkpoints/step-30").mkdir()
    assert how_to_resume(tmp_path) == "the same command resumes from the checkpoint at step 20"
