"""A later run of a benchmark says what it lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.__main__ import RESULTS, main, worse
from benchmarks._rounds import add_arguments, measured
from benchmarks.gpu import VARIANTS, each, together


def test_a_loss_of_five_percent_is_named_in_either_direction() -> None:
    before = {"lora": {"tokens_per_s": 1000, "peak_gib": 20.0, "loss": 12.0, "step_s": 0.5}}
    after = {"lora": {"tokens_per_s": 950, "peak_gib": 20.9, "loss": 13.0, "step_s": 0.55}}
    assert worse(before, after) == ["lora.tokens_per_s: 1000 -> 950 (-5%)", "lora.step_s: 0.5 -> 0.55 (+10%)"]


def test_the_help_of_a_benchmark_is_printed_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(RESULTS.iterdir())
    assert main(["tune", "--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: tune.py")
    assert set(RESULTS.iterdir()) == before


def test_a_benchmark_that_is_not_there_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunes", "--help"]) == 2
    assert "benchmarks: attention" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_what_became_better_is_no_loss() -> None:
    assert worse({"fill": 0.9, "step_s": 1.0}, {"fill": 0.99, "step_s": 0.5}) == []


def test_a_figure_that_is_gone_is_a_loss() -> None:
    assert worse({"lora": {"tokens_per_s": 1000, "tokens": 8}}, {"lora": {"out_of_memory": "so much"}}) == [
        "lora.tokens_per_s: 1000 -> none"
    ]


def runs_out(rank: int) -> None:
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def in_two_processes() -> dict[str, Any]:
    torch.multiprocessing.spawn(runs_out, nprocs=2)
    return {}


def fails() -> dict[str, Any]:
    raise ValueError("no such setting\nat all")


def test_a_variant_that_fails_says_so_and_leaves_the_others_their_results() -> None:
    measured = dict(each({"a": lambda: {"step_s": 1.0}, "b": in_two_processes, "c": fails, "d": lambda: {"step_s": 2.0}}))
    assert measured == {
        "a": {"step_s": 1.0},
        "b": {"out_of_memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."},
        "c": {"failed": "ValueError: no such setting"},
        "d": {"step_s": 2.0},
    }


def test_variant_of_several_workers_is_ended_at_its_limit(tmp_path: Path) -> None:
    """Whatever they are at, such as a collective that the other never comes to; here, at starting."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(TimeoutError, match=r"not done after 0\.1 s"):
        together(2, 0.1, str(tmp_path), None, "full_8b", VARIANTS["full_8b"], [], 1, 1.0, True)
    left = [process.cmdline() for process in set(psutil.Process().children(recursive=True)) - before]
    assert not [words for words in left if "spawn_main" in " ".join(words)]


def test_measurements_that_are_kept_count_in_the_next_command(tmp_path: Path) -> None:
    parser, calls = argparse.ArgumentParser(), []
    add_arguments(parser, runs=3)

    def step() -> dict[str, float]:
        calls.append("step")
        return {"step_s": float(len(calls))}

    def breaks() -> dict[str, float]:
        calls.append("breaks")
        raise AssertionError("no step")

    kept = ["--kept", str(tmp_path / "kept")]
    first = measured({"breaks": breaks, "step": step}, parser.parse_args(["--runs", "2", *kept]))
    assert calls == ["breaks", "step", "step"], "a case that fails is left out of later rounds"
    assert first == {"breaks": {"runs": 0, "failed": 1}, "step": {"step_s": 2.5, "runs": 2}}
    assert measured({"step": step}, parser.parse_args(kept)) == {"step": {"step_s": 3.0, "runs": 3}}
    assert measured({"step": step}, parser.parse_args([*kept, "--runs", "9", "--limit-s", "0"]))["step"]["runs"] == 3
