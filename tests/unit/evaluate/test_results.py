"""The picture of an evaluation."""

from __future__ import annotations

import struct
from pathlib import Path

from raytune_llm.evaluate.results import Score, Shown, _plot

SHOWN = Shown("By hand.", unit="% right", scale=100, digits=2, main=None)


def size_of(picture: Path) -> tuple[int, int]:
    return struct.unpack(">II", picture.read_bytes()[16:24])


def test_a_picture_of_many_tasks_has_rows(tmp_path):
    scores = {"m": {f"task {n}": {"acc": Score(n / 40, 0.1)} for n in range(17)}}
    _plot(tmp_path / "many.png", SHOWN, scores)
    width, height = size_of(tmp_path / "many.png")
    assert width < 6_000 and height == 2 * 3.2 * 200


def test_a_picture_of_many_models_is_no_larger_than_a_picture_can_be(tmp_path):
    scores = {f"m{n}": {f"task {task}": {"acc": Score(0.5, None)} for task in range(3)} for n in range(200)}
    _plot(tmp_path / "many.png", SHOWN, scores)
    assert max(size_of(tmp_path / "many.png")) < 2**16
