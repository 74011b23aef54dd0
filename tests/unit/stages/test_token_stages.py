"""What stage=sft and stage=pretrain do beside their loss: noise, balance of routers, metrics, an anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from raytune_llm import ConfigError
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.losses.tokens import asft, cross_entropy, dft, token_entropy
from raytune_llm.models import attention
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.neftune import neftune_noise
from tests.models import VOCABULARY, logits, packed, some_rows, tiny_llama
from tests.steps import Outcome, make_store, objective_of, run_step, step_of

LENGTHS = [17, 5, 30, 9, 24, 12, 6, 20]
LAYOUTS = {"packs": (True, 8), "packs one by one": (True, 1), "rows joined": (False, 8), "rows in pairs": (False, 2)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    rows = [ConversationRow(ids, spans) for ids, spans in some_rows(LENGTHS)]
    return make_store(tmp_path_factory.mktemp("store"), "conversations", rows)


def tiny_mixtral(checkpointing: bool = False) -> CausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=6, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.attach(model, "varlen")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalLM(model)


def assert_same(ours: Outcome, other: Outcome) -> None:
    assert math.isclose(ours.loss, other.loss, rel_tol=1e-6)
    assert ours.metrics.keys() == other.metrics.keys()
    assert all(math.isclose(ours.metrics[name], other.metrics[name], rel_tol=1e-5) for name in ours.metrics)
    for name, grad in ours.gradients.items():
        torch.testing.assert_close(grad, other.gradients[name], rtol=1e-4, atol=1e-6)


def in_layouts(model: CausalLM, store, *overrides: str) -> list[Outcome]:
    objective = objective_of("stage=sft", *overrides)
    return [
        run_step(model, objective, step_of(store, max_length=48, packing=packing, micro=micro))
        for packing, micro in LAYOUTS.values()
    ]


def shares(model: CausalLM, store, world: int, *overrides: str) -> float:
    """The loss of a step that `world` workers share."""
    objective = objective_of("stage=sft", *overrides)
    steps = [step_of(store, max_length=48, packing=True, micro=1, rank=rank, world=world) for rank in range(world)]
    return sum(float(objective.loss(model, batch).total.detach()) for step in steps for batch in step.batches) / steps[0].count


def test_noise_is_the_same_however_a_step_is_laid_out(store) -> None:
    model = tiny_llama().train()
    first, *others = in_layouts(model, store, "stage.neftune_alpha=5")
    plain = in_layouts(model, store)[0]
    assert abs(first.loss - plain.loss) > 1e-4
    for other in others:
        assert_same(first, other)
    assert math.isclose(shares(model, store, 2, "stage.neftune_alpha=5"), first.loss, rel_tol=1e-6)


def test_noise_is_for_training_only(store) -> None:
    model = tiny_llama().eval()
    assert in_layouts(model, store, "stage.neftune_alpha=5")[0].loss == in_layouts(model, store)[0].loss


def test_noise_is_uniform_within_its_bound_and_differs_by_seed_and_place() -> None:
    lengths, width = [7, 400], 64
    ids = torch.arange(407) % 11
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    noise = neftune_noise(ids, positions, documents, width=width, alpha=5.0, seed=1)
    for rows, length in zip(noise.split(lengths), lengths, strict=True):
        unit = rows / (5.0 / math.sqrt(length * width))
        assert unit.abs().max() <= 1 and abs(unit.mean()) < 0.1
        assert math.isclose(unit.var().item(), 1 / 3, rel_tol=0.1)
    assert len(noise.unique()) > 0.99 * noise.numel()
    other = neftune_noise(ids, positions, documents, width=width, alpha=5.0, seed=2)
    correlation = torch.corrcoef(torch.stack([noise[7:].flatten(), other[7:].flatten()]))[0, 1]
    assert abs(correlation) < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_of_routers_is_the_same_however_a_step_is_laid_out(store, checkpointing: bool) -> None:
    model = tiny_mixtral(checkpointing).train()
    first, *others = in_layouts(model, store, "stage.router_aux_loss_coef=0.5")
    plain = in_layouts(model, store)[0]
    assert math.isclose(first.loss, plain.loss + 0.5 * first.metrics["router_aux_loss"], rel_tol=1e-6)
    assert 2 <= first.metrics["router_aux_loss"] < 6
    router = "model.model.layers.0.mlp.gate.weight"
    assert not torch.allclose(first.gradients[router], plain.gradients[router], rtol=1e-2)
    for other in others:
        assert_same(first, other)
    assert math.isclose(shares(model, store, 2, "stage.router_aux_loss_coef=0.5"), first.loss, rel_tol=1e-6)


def test_a_model_without_routers_can_balance_none(store) -> None:
    with pytest.raises(ConfigError, match=r"stage\.router_aux_loss_coef must be null for llama, which has no routers"):
        in_layouts(tiny_llama(), store, "stage.router_aux_loss_coef=0.5")


@pytest.mark.parametrize("loss", ["cross_entropy", "dft", "eaft"])
def test_metrics_are_means_over_the_trained_tokens_and_cost_no_gradient(store, loss: str) -> None:
    model = tiny_llama()
    rows = some_rows(LENGTHS)
    with torch.no_grad():
        batch = packed(rows)
        all_logits = model(batch, logits)
    targets = batch.targets_N
    out = in_layouts(model, store, f"stage.loss={loss}")[0]
    expected = {
        "token_accuracy": (all_logits.argmax(-1) == targets).float().mean().item(),
        "entropy": token_entropy(all_logits).mean().item(),
    }
    if loss != "cross_entropy":
        expected["nll"] = cross_entropy(all_logits, targets).mean().item()
    assert out.metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_an_anchored_policy_is_held_near_the_model_without_its_adapter(store, targets: list[str]) -> None:
    model = tiny_llama()
    torch.manual_seed(1)
    adapted = get_peft_model(model.model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    policy, rows = CausalLM(adapted), some_rows(LENGTHS)
    batch = packed(rows)
    targets = batch.targets_N
    with torch.no_grad(), adapted.disable_adapter():
        reference = policy(batch, logits)
    ours = policy(batch, logits)
    wanted = asft(ours, targets, reference_logits_NV=reference, alpha=0.3).mean()
    assert abs(wanted - dft(ours, targets).mean()) > 1e-4
    wanted_grads = torch.autograd.grad(wanted, [p for p in policy.parameters() if p.requires_grad])
    out = in_layouts(policy, store, "stage.loss=asft", "stage.asft_alpha=0.3")[0]
    assert math.isclose(out.loss, wanted.item(), rel_tol=1e-5)
    assert math.isclose(out.grad_norm, torch.nn.utils.get_total_norm(wanted_grads).item(), rel_tol=1e-4)


def test_perplexity_follows_from_the_mean_over_all_tokens() -> None:
    derived = objective_of("stage=pretrain").derived
    assert derived({"loss": math.log(20.0)})["perplexity"] == pytest.approx(20)
    assert derived({"loss": 9.0, "nll": math.log(20.0)})["perplexity"] == pytest.approx(20)
    assert derived({"loss": 1e9})["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage.loss=asft", "adapter=none"], r"stage\.loss can be asft with a new adapter only"),
        (["stage.loss=asft", "adapter.path=outputs/x"], r"stage\.loss can be asft with a new adapter only"),
        (["stage.loss=no_such_loss"], r"stage\.loss"),
        (["stage.router_aux_loss_coef=0.1", "train.compile=true"], r"train\.compile can't be true: stage\.router_aux"),
        (["strategy=zero3", "resources=local", "train.compile=true"], r"train\.compile can't be true: strategy=zero3"),
        (["train.compile=false", "train.activation_checkpointing=selective"], r"can be selective only if layers are compiled"),
        (
            ["strategy=zero3", "resources=local", "train.activation_checkpointing=selective"],
            r"can be selective only if layers are compiled: strategy=zero3",
        ),
        (["stage=reward", "data.eval_fraction=0.1", "train.sample_rows=2"], r"train\.sample_rows must be 0 with stage=reward"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides: Sequence[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        objective_of("stage=sft", *overrides)


@pytest.mark.parametrize("overrides", [[], ["stage.loss=dft"]])
def test_tokens_count_in_the_loss_by_the_weight_of_their_answer(tmp_path, overrides: list[str]) -> None:
    """sum(w loss) / sum(w) over the whole step, however it is split."""
    draw = np.random.default_rng(1)
    weights = [(0.5,), (), (2.0, 0.25), (), (0.1, 3.0)]
    rows = []
    for of_spans in weights:
        spans = [2, 5] if len(of_spans) < 2 else [0, 4, 6, 11]
        rows.append(ConversationRow(draw.integers(0, VOCABULARY, 12).astype(np.int32), np.array(spans, np.int32), of_spans))
    model = tiny_llama()
    outs = in_layouts(model, make_store(tmp_path, "conversations", rows), *overrides)
    batch = packed([(row.ids, row.spans) for row in rows])  # type: ignore[misc]
    lengths = [3, 3, 3, 5, 3, 3, 5]
    weight_N = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.0, 0.1, 3.0]).repeat_interleave(torch.tensor(lengths))
    of = {"cross_entropy": cross_entropy, "dft": dft}["dft" if overrides else "cross_entropy"]
    wanted = (weight_N * of(model(batch, logits), batch.targets_N)).sum() / weight_N.sum()
    wanted_grads = torch.autograd.grad(wanted, list(model.parameters()))
    assert math.isclose(outs[0].loss, wanted.item(), rel_tol=1e-6)
    assert math.isclose(outs[0].grad_norm, torch.nn.utils.get_total_norm(wanted_grads).item(), rel_tol=1e-5)
    for other in outs[1:]:
        assert_same(outs[0], other)
