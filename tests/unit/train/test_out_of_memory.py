"""Memory that ran out: where, how much was expected, how much there was, and what would make it fit."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.config.load import load_config
from raytune_llm.train.footprint import GIB, needs_of, ran_out
from raytune_llm.train.phases import phase
from tests.models import LLAMA3_8B


def test_the_error_carries_the_innermost_phase() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, phase("reference"), phase("forward pass"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert caught.value.__notes__[0] == "forward pass"


def explained(*overrides: str, taken_gib: float, total_gib: float) -> str:
    run = load_config("train", ["data.path=rows.jsonl", "data.max_length=8192", "train.precision=bf16", *overrides])
    needs = needs_of(run, LLAMA3_8B, 1, compiled=True)
    return str(ran_out(run, LLAMA3_8B, needs, during="backward pass", taken=int(taken_gib * GIB), total=int(total_gib * GIB)))


def test_it_says_the_phase_the_estimate_what_was_allocated_and_three_ways_out() -> None:
    said = explained("adapter=lora", "train.micro_batch_size=2", "train.global_batch_size=2", taken_gib=39.5, total_gib=40)
    assert "out of GPU memory during backward pass: the estimate was " in said
    assert "39.5 GiB of 40.0 GiB were allocated" in said
    ways = said.partition("Take ")[2].split(", or ")
    assert len(ways) == 3
    assert ways[0].startswith("train.activation_checkpointing=full (about ")
    assert "quantization=bnb_nf4" in said


def test_an_estimate_that_was_too_low_asks_for_more_than_it_would() -> None:
    """What was allocated is more than the estimate: the ways out are held to less memory by the same factor."""
    settings = ["adapter=lora", "train.activation_checkpointing=full"]
    assert "quantization=bnb_nf4" in explained(*settings, taken_gib=30, total_gib=40)
    assert "data.max_length" in explained(*settings, taken_gib=200, total_gib=40)
