"""The same run gives the same numbers whatever the strategy, the world size and the accumulation."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.models.load import files_to_read
from raytune_llm.models.load import load_config as load_model_config
from tests.group import Group, metrics
from tests.runs import tiny_run

SAMPLED = ["train.sample_rows=2", "train.max_new_tokens=5"]
STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MIXTURE = (
    "{model_type: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
    "num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, intermediate_size: 32, max_position_embeddings: 512}"
)
WAYS_TO_SHARD = ["strategy.reshard=grad_only", "strategy.shard_workers=1", "strategy.prefetch=2"]


@pytest.fixture(scope="module", params=["lora", "none"])
def plain(request: pytest.FixtureRequest, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """One process, one sample at a time."""
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("plain") / request.param, f"adapter={request.param}", *SAMPLED)
    api.train(run)
    return run


def assert_same_run(run: TrainRun, other: TrainRun) -> None:
    ours, theirs = metrics(run.output_dir), metrics(other.output_dir)
    assert len(ours) == len(theirs) > 6
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for key in ("loss", "grad_norm", "lr", "tokens_seen", "eval_loss"):
            assert (key in a) == (key in b)
            if key in a:
                assert math.isclose(a[key], b[key], rel_tol=1e-5), (a["step"], key, a[key], b[key])
    assert lines(run, "samples.jsonl") == lines(other, "samples.jsonl")
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].numel() and left[name].shape == right[name].shape
        difference = (left[name] - right[name]).abs().max().item()
        # Adam divides by the gradient's size: where that is tiny, rounding in the last digit moves the weight by a part of lr
        assert difference < 2e-4, (name, difference)


def lines(run: TrainRun, name: str) -> list[str]:
    path = Path(run.output_dir) / name
    return path.read_text().splitlines() if path.exists() else []


def weights(run: TrainRun) -> dict:
    (file,) = (Path(run.output_dir) / "final").glob("*.safetensors")
    return load_file(file)


def elsewhere(plain: TrainRun, folder: Path, *, strategy: str = "ddp", micro: int = 1) -> TrainRun:
    chosen = load_config("train", [*f"strategy={strategy}".split(), "data.path=x"]).strategy
    return replace(
        plain,
        resources=load_config("train", ["data.path=x"]).resources,
        output_dir=str(folder),
        strategy=chosen,
        train=replace(plain.train, micro_batch_size=micro),
    )


def left_in_process(device: torch.device) -> tuple[bool, int]:
    """Whether torch's linear layers are its own, and how many values parameters have."""
    gc.collect()
    own = F.linear is torch._C._nn.linear
    return own, sum(one.numel() for one in gc.get_objects() if issubclass(type(one), nn.Parameter))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_give_the_numbers_of_one_and_keep_nothing_of_a_run(
    strategy: str, plain: TrainRun, two_workers: Group, tmp_path: Path
) -> None:
    run = elsewhere(plain, tmp_path, strategy=strategy, micro=2)
    before = two_workers.call(left_in_process)
    two_workers.run(run, str(prepare(plain.model, plain.data, plain.resources).store.folder))
    assert_same_run(plain, run)
    for (was_own, values), (own, left) in zip(before, two_workers.call(left_in_process), strict=True):
        assert own or not was_own  # a run that was cut off before in these workers may have left DeepSpeed's
        assert left <= values


IN_BITS = [("bnb_nf4", "ddp"), ("bnb_nf4", "fsdp"), ("bnb_int8", "fsdp"), ("bnb_int8", "zero1"), ("bnb_nf4", "zero2")]
IN_BITS += [("hqq", "fsdp"), ("bnb_nf4 adapter=dora", "fsdp"), ("bnb_int8 adapter=dora adapter.rslora=true", "zero2")]


@pytest.mark.parametrize(("bits", "strategy"), IN_BITS)
def test_a_base_in_fewer_bits_gives_the_same_run_on_two_workers(
    bits: str, strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    one = tiny_run(chat_rows, cache, tmp_path / "one", *f"quantization={bits}".split(), "train.max_steps=7")
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    assert_same_run(one, two)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_experts_in_four_bits_make_the_same_run_on_two_workers(
    strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    settings = [f"model.config={MIXTURE}", "quantization=bnb_nf4", "train.max_steps=7"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *settings)
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    assert_same_run(one, two)


def test_adapters_of_experts_make_the_same_run_where_weights_are_sharded(
    chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    settings = ["adapter.experts=true", "adapter.rank=4", "train.max_steps=7"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", f"model.config={MIXTURE}", *settings)
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy="fsdp", micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    assert_same_run(one, two)


@pytest.mark.parametrize("way", WAYS_TO_SHARD)
def test_ways_to_shard_do_not_show(way: str, plain: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    run = elsewhere(plain, tmp_path, strategy=f"fsdp {way}", micro=2)
    two_workers.run(run, str(prepare(plain.model, plain.data, plain.resources).store.folder))
    assert_same_run(plain, run)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_steps_with_a_broken_gradient_change_nothing_on_any_strategy(
    strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    settings = [f"strategy={strategy}", "resources=local", "adapter=none", "schedule=constant", "schedule.warmup_ratio=0"]
    run = tiny_run(chat_rows, cache, tmp_path, *settings, "optimizer.lr=1e30", "train.max_steps=3", "data.eval_fraction=0")
    two_workers.run(run, str(prepare(run.model, run.data, run.resources).store.folder))
    assert [record.get("nonfinite_steps") for record in metrics(str(tmp_path)) if "loss" in record] == [None, 1, 2]


@pytest.mark.parametrize("micro", [2, 8])
def test_accumulation_does_not_show(micro: int, plain: TrainRun, tmp_path: Path) -> None:
    run = replace(plain, output_dir=str(tmp_path), train=replace(plain.train, micro_batch_size=micro))
    api.train(run)
    assert_same_run(plain, run)


FROM_FILES = [
    *product(["adapter=lora", "adapter=none"], ["fsdp", "zero2", "zero3"]),
    *product(["adapter=lora quantization=bnb_nf4"], ["fsdp", "zero2"]),
]


@pytest.mark.parametrize(("trained", "strategy"), FROM_FILES)
def test_weights_read_from_their_file_make_the_same_run(
    trained: str, strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    first = tiny_run(chat_rows, cache, tmp_path / "first", "adapter=none", "train.max_steps=1", "optimizer.lr=1e-2")
    api.train(first)
    final = str(tmp_path / "first" / "final")
    assert files_to_read(load_model_config(final, {}), final) is not None
    saved = ["model=hub", f"model.path={final}", *trained.split(), "train.max_steps=7"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *saved)
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    assert_same_run(one, two)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp strategy.reshard=grad_only"])
def test_the_best_model_is_the_same_where_weights_lie_gathered_after_the_last_evaluation(
    strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    overrides = ["adapter=none", "optimizer.lr=1", "train.max_steps=6", "train.eval_every_steps=2", "checkpoint.final=best"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *overrides, "checkpoint.every_steps=2")
    result = api.train(one)
    evaluated = {record["step"]: record["eval_loss"] for record in metrics(one.output_dir) if "eval_loss" in record}
    assert min(evaluated, key=lambda step: evaluated[step]) < max(evaluated), evaluated
    assert result.final
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    left, right = weights(one), weights(two)
    assert all(torch.allclose(left[name], right[name], atol=2e-4) for name in left)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_an_anchor_and_noise_are_the_same_on_two_workers(
    strategy: str, chat_rows: str, cache: str, two_workers: Group, tmp_path: Path
) -> None:
    overrides = ["stage.loss=asft", "stage.asft_alpha=0.5", "stage.neftune_alpha=5", "train.max_steps=7", "optimizer.lr=1e-2"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *overrides)
    api.train(one)
    two = elsewhere(one, tmp_path / "two", strategy=strategy, micro=2)
    two_workers.run(two, str(prepare(one.model, one.data, one.resources).store.folder))
    assert_same_run(one, two)
