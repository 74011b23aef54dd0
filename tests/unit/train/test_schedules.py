from __future__ import annotations

import math
from itertools import pairwise

import pytest

from raytune_llm.config.schedule import Linear
from raytune_llm.train.schedules import SCHEDULES, learning_rate
from tests.parity.sets import oracle

OURS = {
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine", {"floor": 0.0}),
    "cosine_with_min_lr": ("cosine", {"floor": 0.1}),
    "inverse_sqrt": ("inverse_sqrt", {"timescale": None}),
    "polynomial": ("polynomial", {}),
    "warmup_stable_decay": ("wsd", {"decay_ratio": None, "floor": 0.0}),
}


def test_every_reference_schedule_is_met():
    cases = [case for case in oracle("optim")["cases"] if case["kind"] == "schedule"]
    assert len(cases) >= 8
    for case in cases:
        params = case["params"]
        name, settings = OURS[params["name"]]
        warmup = 0 if params["name"] == "constant" else params["warmup"]
        if name == "cosine":
            settings = {"floor": params.get("min_lr", 0.0) / params["lr"]}
        if name == "polynomial":
            settings = {"power": 1.0, "end": 1e-7 / params["lr"]}
        for step, expected in enumerate(case["expected"]["lr"]):
            assert math.isclose(
                params["lr"] * SCHEDULES[name](step, warmup, params["total"], **settings), expected, abs_tol=1e-12
            )


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "polynomial"])
def test_a_descent_ends_at_its_floor(name):
    settings = {
        "linear": {},
        "cosine": {"floor": 0.1},
        "wsd": {"decay_ratio": 0.2, "floor": 0.1},
        "polynomial": {"power": 2.0, "end": 0.1},
    }
    rates = [SCHEDULES[name](step, 3, 50, **settings[name]) for step in range(51)]
    assert rates[0] == 0 and max(rates) == 1
    assert math.isclose(rates[50], 0.0 if name == "linear" else 0.1, abs_tol=1e-9)
    assert all(a >= b for a, b in pairwise(rates[3:]))


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.2, "warmup_steps": None}, {"warmup_ratio": None, "warmup_steps": 20}])
def test_warm_up_is_a_part_of_all_steps_or_a_number_of_them(warmup):
    rate = learning_rate(Linear(name="linear", **warmup), peak=2.0, total=100)
    assert [rate(step) for step in (0, 10, 20, 60, 100)] == [0.0, 1.0, 2.0, 1.0, 0.0]
