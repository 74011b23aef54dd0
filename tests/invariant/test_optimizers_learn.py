"""Each optimizer trains a small random model for 200 steps to a loss that is known, which a wrong update would miss."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.losses import OPTIMIZERS, curve_of, tenths
from raytune_llm.config.overrides import CONF

FIRST = 5.554
"""Nats, in the first step."""
SETTINGS = ["data.max_length=128", "train.global_batch_size=4", "train.micro_batch_size=4", "adapter=none"]
FOUND = {
    "adamw": (3e-3, 0.955), "adamw_8bit": (3e-3, 0.937), "adamw_bf16": (3e-3, 0.936), "adam_mini": (3e-3, 1.256),
    "adafactor": (3e-3, 0.894), "apollo": (3e-3, 0.937), "apollo_mini": (3e-3, 1.357), "badam": (1e-2, 1.249),
    "galore": (3e-3, 0.937), "lion": (1e-3, 1.476), "muon": (2e-2, 0.476), "schedule_free": (3e-3, 0.82), "sgd": (0.3, 1.451),
    "lomo": (1.0, 2.595), "adalomo": (1e-2, 1.848),
}  # fmt: skip
"""The rate, and the mean loss in nats of the last 20 steps."""
OWN = {"badam": ["optimizer.outside_layers=true", "optimizer.switch_every=10"]}
"""By default it trains neither embedding nor head, without which so small a model learns little."""
BAND = 0.2
"""How far from it, over it: other processors round otherwise, and 200 steps make more of that."""


def test_every_optimizer_has_its_band() -> None:
    """Paged memory is a GPU's; what is in it are the numbers of adamw_8bit."""
    assert FOUND.keys() == OPTIMIZERS.keys() == {path.stem for path in (CONF / "optimizer").glob("*.yaml")} - {"paged_adamw_8bit"}


def test_an_optimizer_that_does_nothing_misses_every_band() -> None:
    assert all(loss * (1 + BAND) < FIRST / 1.5 for _, loss in FOUND.values())


@pytest.mark.long
@pytest.mark.parametrize("name", FOUND)
def test_two_hundred_steps_reach_the_loss_of_the_band(name: str, tmp_path: Path) -> None:
    rate, loss = FOUND[name]
    settings = [f"optimizer={name}", *OPTIMIZERS[name], *OWN.get(name, []), *SETTINGS, f"optimizer.lr={rate}"]
    curve = curve_of(settings, model="tiny_random", steps=200, folder=tmp_path / "run")
    assert curve[0] == pytest.approx(FIRST, abs=0.01)
    assert tenths(curve)[-1] == pytest.approx(loss, rel=BAND)
