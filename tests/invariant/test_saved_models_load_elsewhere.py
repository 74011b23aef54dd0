"""What a run saves is what it had in memory, for PEFT and transformers without any of our code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.models.build import build_policy, run_config
from raytune_llm.models.load import load_model
from raytune_llm.runs.worker import restore
from raytune_llm.train.checkpoint import Checkpoints
from raytune_llm.train.strategies.base import Training
from raytune_llm.train.strategies.ddp import DDPStrategy
from tests.group import Group
from tests.models import logits, packed
from tests.runs import tiny_run


def in_memory_logits(run: TrainRun, ids: torch.Tensor) -> torch.Tensor:
    """Of the newest checkpoint, through our own model."""
    tokenizer = load_tokenizer(None, revision=None, trust_remote_code=False, kind="bytes")
    config = run_config(run.model, tokenizer, run.data.max_length)
    cpu = torch.device("cpu")
    policy, _ = build_policy(config, run.model, run.adapter, compute=torch.float32, seed=run.train.seed, device=cpu)
    strategy = DDPStrategy(
        policy,
        lambda model, fused: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused),
        Training(cpu, torch.float32, max_grad_norm=None),
    )
    restore(Checkpoints(Path(run.output_dir) / "checkpoints", keep=1, asynchronous=False), strategy)
    row = (ids.numpy(), torch.tensor([0, len(ids)]).numpy())
    with torch.no_grad():
        return policy(packed([row]), logits)


def base_of(run: TrainRun) -> torch.nn.Module:
    tokenizer = load_tokenizer(None, revision=None, trust_remote_code=False, kind="bytes")
    config = run_config(run.model, tokenizer, run.data.max_length)
    return load_model(config, None, weights="random", dtype=torch.float32, seed=run.train.seed)


@pytest.fixture(scope="module", params=["lora", "none"])
def run(request: pytest.FixtureRequest, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    folder = tmp_path_factory.mktemp("saved")
    return tiny_run(chat_rows, cache, folder, f"adapter={request.param}", "train.max_steps=3", "data.eval_fraction=0")


@pytest.mark.parametrize("strategy", ["inline", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_logits_of_the_saved_model_are_those_in_memory(strategy: str, run: TrainRun, two_workers: Group, tmp_path: Path) -> None:
    run = replace(run, output_dir=str(tmp_path))
    if strategy == "inline":
        api.train(run)
    else:
        chosen = load_config("train", [f"strategy={strategy}", "data.path=x"])
        run = replace(run, strategy=chosen.strategy, resources=chosen.resources)
        inline = load_config("train", ["resources=inline", "data.path=x"]).resources
        two_workers.run(run, str(prepare(run.model, run.data, inline).store.folder))
    final = tmp_path / "final"
    (weights,) = final.glob("*.safetensors")
    assert all(tensor.numel() for tensor in load_file(weights).values())
    ids = torch.arange(5, 60)
    if run.adapter.name == "lora":
        model = PeftModel.from_pretrained(base_of(run), final)
    else:
        model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    with torch.no_grad():
        loaded = model(input_ids=ids[None]).logits[0, :-1]
    assert torch.allclose(loaded, in_memory_logits(run, ids), atol=1e-5)
    assert AutoTokenizer.from_pretrained(final).chat_template


def test_a_full_model_goes_on_training_and_talks(chat_rows: str, cache: str, tmp_path: Path) -> None:
    first = tiny_run(chat_rows, cache, tmp_path / "first", "adapter=none", "train.max_steps=2")
    api.train(first)
    overrides = ["model=hub", f"model.path={tmp_path / 'first' / 'final'}", "adapter=lora", "train.max_steps=2"]
    second = tiny_run(chat_rows, cache, tmp_path / "second", *overrides, "train.exact_match_rows=2", "train.max_new_tokens=4")
    result = api.train(second)
    assert result.after is not None and result.after.total == 2


def test_an_adapter_goes_on_from_a_saved_one(chat_rows: str, cache: str, tmp_path: Path) -> None:
    first = tiny_run(chat_rows, cache, tmp_path / "first", "train.max_steps=6", "optimizer.lr=1e-2")
    learned = api.train(first).summary.loss_last
    second = tiny_run(chat_rows, cache, tmp_path / "second", "train.max_steps=2", f"adapter.path={tmp_path / 'first' / 'final'}")
    fresh = tiny_run(chat_rows, cache, tmp_path / "fresh", "train.max_steps=2")
    assert learned is not None
    assert api.train(second).summary.loss_first < api.train(fresh).summary.loss_first - 0.05
