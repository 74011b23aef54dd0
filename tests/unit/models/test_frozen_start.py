"""Frozen layers before the first trained one: computed once for each batch, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raytune_llm import api
from raytune_llm.models.build import ForTraining, build_policy
from raytune_llm.models.frozen_start import IN_A_ROW, KnownStates, frozen_start
from raytune_llm.models.load import load_config
from raytune_llm.models.shared import SharedModel
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs import build
from tests.models import VOCABULARY, lora_section, model_section, packed, some_rows
from tests.runs import tiny_run

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 8}}
LAST_TWO = lora_section(last_layers=2)


def policy_of(family="llama", adapter: object = LAST_TWO, *, once=True, shared=None, **settings):
    config = {"model_type": family, "num_key_value_heads": 2, "pad_token_id": 0, **SIZES, **FAMILIES[family]}
    model = model_section(path=None, weights="random", config=config)
    settings = {"training": ForTraining(starts_once=once, trains_again=once), "shared": shared, **settings}
    cpu = torch.device("cpu")
    policy, _ = build_policy(load_config(None, config), model, adapter, compute=torch.float32, seed=0, device=cpu, **settings)  # type: ignore[arg-type]
    return policy


def passes(policy) -> list[int]:
    """Grows by the number of a layer that computes."""
    computed: list[int] = []
    for number, layer in enumerate(policy.base.base_model.layers):
        layer.register_forward_hook(lambda layer, given, out, number=number: computed.append(number))
    return computed


def trained_twice(policy) -> list[torch.Tensor]:
    """Two steps on a batch with an evaluation after each: losses and what was learned."""
    batch, found = packed(some_rows([9, 7, 16])), []
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        loss = policy.train()(batch, entropy).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found += [loss.detach(), policy.eval()(batch, entropy).sum()]
    return [*found, *(weight.detach() for weight in trained)]


def entropy(logits_NV, targets_N):
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


def test_every_family_that_is_known_to_be_in_a_row_is_tested():
    assert {type(policy_of(family).base.base_model).__name__ for family in FAMILIES} == IN_A_ROW


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_that_comes_again_passes_through_the_trained_layers_alone_and_gives_the_same_to_the_bit(family):
    once, each_time = policy_of(family), policy_of(family, once=False)
    computed = passes(once)
    of_once, of_each = trained_twice(once), trained_twice(each_time)
    assert computed == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 2, 3]
    assert len(of_once) > 20
    assert all(torch.equal(one, other) for one, other in zip(of_once, of_each, strict=True))


def test_another_batch_and_a_batch_of_other_boundaries_are_computed_by_themselves():
    policy, plain = policy_of().eval(), policy_of(once=False).eval()
    with torch.no_grad():
        for rows in (some_rows([9, 7, 16]), some_rows([9, 7, 16], seed=1), some_rows([16, 16]), some_rows([9, 7, 16])):
            assert torch.equal(policy(packed(rows), entropy), plain(packed(rows), entropy))


def test_batches_that_are_trained_on_once_are_not_kept():
    policy = policy_of()
    policy.frozen_start = frozen_start(policy.base, KnownStates(), trains_again=False)
    computed = passes(policy)
    for _ in range(2):
        policy(packed(some_rows([9, 7])), entropy)
    assert computed == [0, 1, 2, 3] * 2


def test_what_there_is_no_room_for_is_computed_again():
    policy = policy_of().eval()
    policy.frozen_start = frozen_start(policy.base, KnownStates(most_bytes=16 * 32 * 4), trains_again=True)
    computed = passes(policy)
    with torch.no_grad():
        for rows in (some_rows([9, 7]), some_rows([9, 7], seed=1)) * 2:
            policy(packed(rows), entropy)
    assert computed == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 0, 1, 2, 3]


def test_models_over_one_base_share_what_is_known_and_another_base_begins_anew():
    shared = SharedModel()
    first, second = policy_of(shared=shared), policy_of(adapter=lora_section(last_layers=1), shared=shared)
    third = policy_of(adapter=lora_section(last_layers=2, rank=2), shared=shared)
    other = policy_of("qwen2", shared=shared)
    computed = {policy: passes(policy) for policy in (first, second, third, other)}
    for policy in computed:
        policy(packed(some_rows([9, 7])), entropy)
    assert list(computed.values()) == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]


def test_a_model_whose_first_layer_or_embedding_is_trained_has_no_frozen_start():
    assert policy_of().frozen_start is not None
    assert policy_of(adapter=lora_section()).frozen_start is None
    assert policy_of(adapter=lora_section(last_layers=2, modules_to_save=["embed_tokens"])).frozen_start is None
    assert policy_of(training=None).frozen_start is None


@pytest.mark.parametrize("adapter", [["adapter.last_layers=1"], ["adapter=freeze", "adapter.last_layers=1"]])
def test_a_run_of_two_epochs_with_evaluations_is_the_same_to_the_bit(chat_rows, cache, tmp_path, monkeypatch, adapter):
    def run(name: str) -> list[dict]:
        overrides = ["train.global_batch_size=2", "train.max_steps=8", "train.eval_every_steps=2", *adapter]
        api.train(tiny_run(chat_rows, cache, tmp_path / name, *overrides))
        return read_metrics(tmp_path / name / "metrics.jsonl")

    once = run("once")
    monkeypatch.setattr(build, "computes_first_once", lambda *_, **__: False)
    each_time = run("each_time")
    figures = ("step", "loss", "grad_norm", "eval_loss")
    assert [[one.get(name) for name in figures] for one in once] == [[one.get(name) for name in figures] for one in each_time]
