"""Memory that ran out: where, how much was expected, how much there was, and what would make it fit."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.memory.fixes import ran_out
from raytune_llm.memory.footprint import GIB, USABLE, Needs, estimate, least_recomputation, needs_of
from raytune_llm.models.activations import compiles
from raytune_llm.train.phases import phase
from tests.models import LLAMA3_8B

TWO_LAYERS = LlamaConfig(**{**LLAMA3_8B.to_dict(), "num_hidden_layers": 2, "vocab_size": 32_000})


def test_the_error_carries_the_innermost_phase() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, phase("reference"), phase("forward pass"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert caught.value.__notes__[0] == "forward pass"


def explained(*overrides: str, taken_gib: float, total_gib: float, others_gib: float = 0) -> str:
    run = load_config("train", by_key(["data.path=rows.jsonl", "data.max_length=8192", "train.precision=bf16"], list(overrides)))
    needs = needs_of(run, LLAMA3_8B, 1, compiled=True)
    taken, total, others = (int(gib * GIB) for gib in (taken_gib, total_gib, others_gib))
    return str(ran_out(run, LLAMA3_8B, needs, during="backward pass", taken=taken, total=total, others=others))


def test_it_says_the_phase_the_estimate_what_was_allocated_and_three_ways_out() -> None:
    said = explained("adapter=lora", "train.micro_batch_size=2", "train.global_batch_size=2", taken_gib=39.5, total_gib=40)
    assert "out of GPU memory during backward pass: the estimate was " in said
    assert "39.5 GiB of 40.0 GiB were allocated" in said
    ways = said.partition("Set ")[2].split(", or ")
    assert len(ways) == 3
    assert ways[0].startswith("train.activation_checkpointing=full (about ")
    assert "quantization=bnb_nf4" in said


def test_remedies_need_less_than_what_ran_out_though_the_estimate_would_have_fitted() -> None:
    said = explained("adapter=lora", "train.activation_checkpointing=full", taken_gib=79, total_gib=80)
    expected = float(said.partition("estimate was ")[2].partition(" GiB")[0])
    assert expected < 20
    assert max(gib for _, gib in proposed(said)) < expected


def test_a_gpu_that_is_full_of_others_is_said_to_be() -> None:
    settings = ["adapter=lora", "train.activation_checkpointing=full", "data.max_length=2048"]
    said = explained(*settings, taken_gib=11.5, total_gib=80, others_gib=68)
    assert "other processes hold 68.0 GiB of it. End those" in said
    assert all(gib < 12 for _, gib in proposed(said))
    assert "other processes" not in explained(*settings, taken_gib=11.5, total_gib=12)


def test_activations_may_wait_in_host_memory() -> None:
    settings = ["adapter=lora", "train.activation_checkpointing=full", "data.max_length=131072"]
    assert "train.activation_checkpointing=offload (about " in explained(*settings, taken_gib=79, total_gib=80)


def test_what_still_does_not_fit_gets_shorter_by_as_little_as_it_takes() -> None:
    settings = ["adapter=lora", "quantization=bnb_nf4", "train.activation_checkpointing=offload", "train.global_batch_size=1"]
    ((overrides, gib),) = proposed(explained(*settings, "data.max_length=65536", taken_gib=19, total_gib=20))
    length = int(overrides[0].removeprefix("data.max_length="))
    assert 16_384 < length < 65_536
    assert gib == pytest.approx(0.92 * 20, rel=0.02)


def test_where_nothing_fits_it_says_so() -> None:
    said = explained("adapter=none", "strategy=zero1", taken_gib=0.9, total_gib=1)
    assert "Set a smaller model, or a GPU with more memory." in said


RUNS = [
    ["adapter=lora"],
    ["adapter=lora", "resources=inline"],
    ["adapter=lora", "resources=inline", "quantization=fp8"],
    ["adapter=lora", "quantization=fp8"],
    ["adapter=lora", "quantization=bnb_nf4", "train.micro_batch_size=2"],
    ["adapter=none"],
    ["adapter=none", "resources=inline", "train.micro_batch_size=2", "train.global_batch_size=4"],
    ["adapter=none", "quantization=fp8"],
    ["adapter=none", "quantization=fp8", "strategy=fsdp", "resources.num_workers=2"],
    ["adapter=none", "strategy=zero3", "resources.num_workers=4"],
    ["adapter=lora", "strategy=zero1", "train.compile=false"],
    ["adapter=lora", "resources.num_workers=3", "train.global_batch_size=6", "train.micro_batch_size=2"],
    ["adapter=none", "data=chat_pairs", "stage=dpo", "stage.reference=online", "train.micro_batch_size=2"],
    ["adapter=none", "train.activation_checkpointing=selective", "train.compile=true"],
]


@pytest.mark.parametrize("total_gib", [4, 10])
@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_every_remedy_is_a_run_that_is_accepted_and_fits(overrides: list[str], total_gib: int) -> None:
    given = ["data.path=rows.jsonl", "data.max_length=8192", "train.precision=bf16", *overrides]
    run, needs = ready(given, total_gib)
    expected = estimate(run, TWO_LAYERS, needs).total
    ways = proposed(str(ran_out(run, TWO_LAYERS, needs, during="a step", taken=0, total=total_gib * GIB)))
    assert ways
    for settings, gib in ways:
        run, needs = ready(by_key(given, settings), total_gib)
        needed = estimate(run, TWO_LAYERS, needs).total
        assert run.train.global_batch_size % (needs.micro_batch_size * needs.world_size) == 0
        assert needed / GIB == pytest.approx(gib, abs=0.051)
        assert needed <= USABLE * min(total_gib * GIB, expected)


def ready(overrides: list[str], total_gib: int) -> tuple[TrainRun, Needs]:
    """As a worker on a machine with one GPU would have it."""
    run = load_config("train", overrides)
    world = run.resources.num_workers if isinstance(run.resources.num_workers, int) else 1
    compiled, _ = compiles(run.train.compile, "cuda", never=run.uncompiled)
    needs = needs_of(run, TWO_LAYERS, world, compiled=compiled)
    if run.train.activation_checkpointing == "auto":
        needs = least_recomputation(needs, partial(estimate, run, TWO_LAYERS), USABLE * total_gib * GIB)
    return run, needs


def by_key(given: list[str], changes: list[str]) -> list[str]:
    """The command line with some of its words in another's place."""
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in [*given, *changes]).items()]


def proposed(said: str) -> list[tuple[list[str], float]]:
    """The overrides of each fix, and what it says that they need."""
    return [(words.split(), float(gib)) for words, gib in re.findall(r"((?:[\w.]+=\S+ )+)\(about ([\d.]+) GiB\)", said)]
