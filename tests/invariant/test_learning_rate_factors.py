"""A group of parameters keeps its factor of the learning rate on every strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from raytune_llm.config.load import load_config
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.train.strategies import spread
from raytune_llm.train.strategies.base import Training
from tests.models import packed, some_rows, tiny_llama

LR, FACTOR = 0.25, 8.0
STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]


def with_faster_head(model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """Gradient descent."""
    named = dict(model.named_parameters())
    head = [name for name in named if "lm_head" in name]
    rest = [parameter for name, parameter in named.items() if name not in head]
    return torch.optim.SGD([{"params": rest}, {"params": [named[name] for name in head], "lr_factor": FACTOR}], lr=LR)


def one_step(strategy: str) -> dict[str, Tensor]:
    """How far each parameter goes."""
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    section = load_config("train", ["data.path=rows.jsonl", f"strategy={strategy}"]).strategy
    trained = spread(section, model, with_faster_head, Training(torch.device("cpu"), torch.float32, max_grad_norm=None))
    batch = packed(some_rows([9, 20, 14]))
    with trained.accumulate(last=True):
        trained.backward(trained.model(batch, cross_entropy).mean(), LR)
    trained.step(LR)
    return {name: whole - before[name] for name, whole in trained.full_parameters()}


def in_a_process(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=rank, world_size=1)
    torch.save({strategy: one_step(strategy) for strategy in STRATEGIES}, file)
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_a_group_keeps_its_factor_of_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    mp.spawn(in_a_process, (str(tmp_path / "steps"),), nprocs=1)
    steps = torch.load(tmp_path / "steps")
    model = tiny_llama()
    model(packed(some_rows([9, 20, 14])), cross_entropy).mean().backward()
    for strategy in STRATEGIES:
        assert len(steps[strategy]) > 10
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            factor = FACTOR if "lm_head" in name else 1.0
            torch.testing.assert_close(steps[strategy][name], -LR * factor * parameter.grad, rtol=1e-4, atol=1e-6)
