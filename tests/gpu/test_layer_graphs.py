"""Steps whose layers are captured as CUDA graphs, beside steps as they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate
from raytune_llm.data.steps import Step
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.models.shared_pass import OneOfSeveral, SharedPass
from raytune_llm.runs.build import Builder
from raytune_llm.stages import STAGES
from raytune_llm.train.loop import Learner, one_step, to_device
from raytune_llm.train.window import Window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
MODEL = (
    "{model_type:llama,vocab_size:512,hidden_size:256,intermediate_size:512,num_hidden_layers:3,num_attention_heads:4,"
    "num_key_value_heads:2,max_position_embeddings:1024,tie_word_embeddings:false}"
)
LORA = ("adapter=lora", "adapter.rank=8")
TOKENS = 256
DOCUMENTS = ((100, 120), (90, 30, 60, 50), (250,), (20,) * 11, (100, 140), (256,))


def run_of(*overrides: str) -> TrainRun:
    base = [
        "model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", f"++model.config={MODEL}",
        "data.path=none", f"data.max_length={TOKENS}", "resources=inline", "train.seed=0", "train.global_batch_size=2",
        "train.micro_batch_size=1", "optimizer.lr=1e-3",
    ]  # fmt: skip
    return load_config("train", [*base, *overrides])


def steps() -> list[Step]:
    """Of two micro-batches each, of other numbers of documents and of trained tokens."""
    random, made = np.random.default_rng(0), []
    for number in range(9):
        batches = []
        for of_step in range(2):
            lengths = DOCUMENTS[(2 * number + of_step) % len(DOCUMENTS)]
            line = [(random.integers(0, 512, n), np.array([n - n // (2 + of_step), n])) for n in lengths]
            batches.append(collate([line], length=TOKENS, pad_id=0, sample_ids=(2 * number + of_step,)))
        count = sum(len(batch.trained_N) for batch in batches)
        step = Step(
            epoch=0, cursor=0, fraction=0.0, batches=batches, first_rows=[0, 0], num_rows=2, count=count, tokens=2 * TOKENS,
            sample_ids=(2 * number, 2 * number + 1),
        )  # fmt: skip
        made.append(step)
    return made


def losses(*overrides: str) -> list[float]:
    torch._dynamo.reset()
    run = run_of(*overrides)
    built = Builder(run, load_model_config(None, run.model.config), CUDA).build()
    built.strategy.model.train()
    learner = Learner(strategy=built.strategy, objective=STAGES["sft"].objective(run.stage), device=CUDA)
    found = []
    for number, step in enumerate(steps()):
        window = Window(CUDA, {})
        one_step(learner, step, window, lr=1e-3, seed=number)
        total, count = window.read()["loss"]
        found.append(total / count)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (*LORA, "train.compile=false"),
        (*LORA, "train.compile=true"),
        (*LORA, "train.compile=true", "adapter.dropout=0.3"),
        (*LORA, "train.compile=false", "adapter.dropout=0.3"),
        ("adapter=none", "train.compile=true"),
        (*LORA, "train.compile=true", "train.activation_checkpointing=full"),
        (*LORA, "train.precision=fp16", "train.compile=false"),
    ],
    ids=["plain", "compiled", "compiled_dropout", "dropout", "full", "recomputed", "fp16"],
)
def test_captured_steps_are_steps_as_they_are_written(overrides):
    plain, captured = losses(*overrides), losses(*overrides, "train.cuda_graphs=true")
    np.testing.assert_allclose(captured, plain, rtol=3e-3)
    assert plain[-1] != plain[0]


def bank_gradients(*overrides: str) -> list[dict[str, Tensor]]:
    """Of three runs in one pass, over three batches."""
    torch._dynamo.reset()
    run = run_of(*LORA, "train.compile=true", *overrides)
    policy, _, _ = Builder(run, load_model_config(None, run.model.config), CUDA, together=[run] * 3).policy()
    assert isinstance(policy, CausalLM)
    policy.train()
    pass_ = SharedPass(policy)
    for number in range(3):
        pass_.bank.add(f"run{number}", run.adapter, seed=number)
    members: list[Any] = [OneOfSeveral(pass_, f"run{number}", None) for number in range(3)]
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "b_GRO" in name:
            parameter.data.normal_(std=0.02)
            parameter.data[-1].zero_()
    objective, found = STAGES["sft"].objective(run.stage), []
    for step in steps()[:3]:
        batch = to_device(step.batches[0], CUDA)
        with pass_.of(members):
            torch.stack([objective.loss(member, batch).total for member in members]).sum().backward()
        found.append({name: one.grad.clone() for name, one in policy.named_parameters() if one.grad is not None})
        policy.zero_grad(set_to_none=True)
    return found


def test_captured_passes_of_several_runs_are_passes_as_they_are_written():
    for plain, captured in zip(bank_gradients(), bank_gradients("train.cuda_graphs=true"), strict=True):
        assert plain.keys() == captured.keys()
        for name, wanted in plain.items():
            assert (captured[name] - wanted).norm() <= 2e-2 * wanted.norm() + 1e-6, name
