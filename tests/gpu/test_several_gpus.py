"""Two, four and eight GPUs over NCCL, as many as there are, give the numbers of one for the same global batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from tests.group import Group, metrics
from tests.runs import tiny_run

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
NUMBERS = [number for number in (2, 4, 8) if number <= torch.cuda.device_count()] or [2]


@pytest.fixture(scope="module", params=NUMBERS)
def gpus(request: pytest.FixtureRequest) -> Iterator[Group]:
    group = Group(request.param, "cuda")
    yield group
    group.close()


@pytest.fixture(scope="module", params=["lora", "none"])
def plain(request: pytest.FixtureRequest, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """One GPU, in float32."""
    folder = tmp_path_factory.mktemp("plain") / request.param
    run = tiny_run(chat_rows, cache, folder, f"adapter={request.param}", "train.compile=false")
    api.train(run)
    return run


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", "fsdp strategy.offload=true", "fsdp strategy.reshard=grad_only", "zero2", "zero3"]
)
def test_gpus_give_the_numbers_of_one(strategy: str, compiled: str, plain: TrainRun, gpus: Group, tmp_path: Path) -> None:
    if strategy == "zero3" and compiled == "true":
        pytest.skip("its hooks are not for compiled code")
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    settings = load_config("train", [*f"strategy={strategy}".split(), f"train.compile={compiled}", "data.path=x"])
    micro_batch_size = min(2, plain.train.global_batch_size // len(gpus.processes))
    run = replace(
        plain,
        resources=settings.resources,
        output_dir=str(tmp_path),
        strategy=settings.strategy,
        train=replace(plain.train, micro_batch_size=micro_batch_size, compile=settings.train.compile),
    )
    gpus.run(run, str(prepare(plain.model, plain.data, plain.resources).store.folder))
    ours, theirs = metrics(plain.output_dir), metrics(run.output_dir)
    assert len(ours) == len(theirs) > 6
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (key in a) == (key in b)
            if key in a:
                assert math.isclose(a[key], b[key], rel_tol=1e-4), (a["step"], key, a[key], b[key])
