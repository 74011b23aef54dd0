"""A sweep whose process is killed, in the middle of a trial, is resumed to the results of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_llm.report.metrics import read_metrics

WORDS = [
    "model=tiny_random", "resources=inline", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
    "train.global_batch_size=4", "train.max_steps=4", "train.eval_every_steps=1", "checkpoint.every_steps=1",
    "data.max_length=64", "data.eval_fraction=0.1", "optimizer.lr=1e-4,1e-3,1e-2", "tune=grid",
]  # fmt: skip


def started(rows: str, cache: str, folder: Path) -> subprocess.Popen:
    words = [*WORDS, f"data.path={rows}", f"data.cache={cache}", f"output_dir={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "raytune_llm", "tune", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def reported(folder: Path) -> list[tuple[int, int]]:
    """(trial, step) of each report so far."""
    path = folder / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    events = [json.loads(line) for line in lines]
    return [(event["trial"], event["step"]) for event in events if event["event"] == "reported"]


def numbers(folder: Path) -> tuple[dict, list[list[float]]]:
    said = json.loads((folder / "results.json").read_text())
    losses = [
        [record["eval_loss"] for record in read_metrics(Path(trial["folder"]) / "metrics.jsonl") if "eval_loss" in record]
        for trial in said["trials"]
    ]
    plain = [{name: value for name, value in trial.items() if name not in ("folder", "seconds")} for trial in said["trials"]]
    return {"best": (said["best"]["settings"], said["best"]["metric"]), "trials": plain}, losses


@pytest.fixture(scope="module")
def whole(chat_rows, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    undisturbed = started(chat_rows, cache, folder)
    said, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, said
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_sweep_is_an_undisturbed_one(how, code, whole, chat_rows, cache, tmp_path):
    cut = started(chat_rows, cache, tmp_path / "cut")
    end = time.monotonic() + 600
    while (1, 3) not in reported(tmp_path / "cut"):
        assert cut.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(cut.pid, how)
    said, _ = cut.communicate(timeout=120)
    assert cut.returncode == code
    assert how != signal.SIGINT or b"this resumes the sweep: python -m raytune_llm tune" in said

    finished = (tmp_path / "cut" / "trials").glob("000_*/finished.json")
    before = [path.stat().st_mtime_ns for path in finished]
    again = started(chat_rows, cache, tmp_path / "cut")
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cut" / "trials").glob("000_*/finished.json")] == before
    assert numbers(tmp_path / "cut") == numbers(whole)
