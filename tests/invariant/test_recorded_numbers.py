"""Small runs of every stage give the numbers that were recorded, wherever they train and interrupted or not (see record.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.group import Group
from tests.invariant.record import CASES, RUNS, Runner, differences


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads are other sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_recorded(runner: Runner, name: str, place: str, *, interrupted: bool) -> None:
    differs = differences(name, place, runner.numbers(name, place, interrupted=interrupted))
    far = {metric: part for metric, part in differs.items() if part > 1}
    assert not far, f"times what is allowed: {far}"
    assert {"loss", "grad_norm"} <= differs.keys()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("inline"))


@pytest.fixture(scope="module")
def spread_runner(tmp_path_factory: pytest.TempPathFactory, two_workers: Group) -> Runner:
    return Runner(tmp_path_factory.mktemp("spread"), two_workers)


@pytest.mark.parametrize("interrupted", [False, True], ids=["uninterrupted", "interrupted"])
@pytest.mark.parametrize("name", RUNS)
def test_in_one_process(name: str, interrupted: bool, runner: Runner) -> None:
    assert_recorded(runner, name, "inline", interrupted=interrupted)


@pytest.mark.long
@pytest.mark.parametrize(("name", "place"), [case for case in CASES if case[1] != "inline"])
def test_on_two_workers_across_an_interruption(name: str, place: str, spread_runner: Runner) -> None:
    assert_recorded(spread_runner, name, place, interrupted=True)
