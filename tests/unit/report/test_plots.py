from __future__ import annotations

import math

import matplotlib.image
import numpy as np
import pytest

from raytune_llm.report.plots import loss_curve, smoothed


def records(num_steps):
    train = [{"step": step, "loss": 3 / step, "lr": 1e-3 / step} for step in range(1, num_steps + 1)]
    return [*train, {"step": num_steps, "eval_loss": 0.5}] if num_steps else []


@pytest.mark.parametrize("num_steps", [0, 1, 2, 300])
def test_a_run_of_any_length_has_a_picture(tmp_path, num_steps):
    loss_curve(records(num_steps), tmp_path / "loss.png", title="run")
    height, width, _ = matplotlib.image.imread(tmp_path / "loss.png").shape
    assert (width, height) == (1600, 1000)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_losses_that_are_not_finite_leave_the_rest_of_the_picture_as_it_is(tmp_path):
    finite = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 4)]
    loss_curve(finite, tmp_path / "finite.png", title="run")
    loss_curve([*finite, {"step": 3, "loss": math.nan}, {"step": 5}], tmp_path / "both.png", title="run")
    assert (tmp_path / "finite.png").read_bytes() == (tmp_path / "both.png").read_bytes()


def test_eval_losses_are_drawn(tmp_path):
    loss_curve(records(30), tmp_path / "with.png", title="run")
    loss_curve([record for record in records(30) if "loss" in record], tmp_path / "without.png", title="run")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_smoothing_keeps_a_straight_line_until_it_looks_back_at_the_end():
    line = np.arange(20.0)
    np.testing.assert_allclose(smoothed(line, window=7)[:17], line[:17])
    assert smoothed(line, window=7)[-1] == np.mean([16, 17, 18, 19])


def test_smoothing_over_one_value_changes_nothing():
    values = np.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(smoothed(values, window=1), values)
