"""EVA begins as PEFT's own with the ranks left as they are, and looks at each tensor once."""

from __future__ import annotations

from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights

from raytune_llm.models.adapters import OWN, PeftAdapters
from raytune_llm.models.adapters.eva import Components, Inputs
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.records import Batch
from tests.models import packed, some_rows
from tests.unit.models.adapters.test_kinds import base, hidden, section

LENGTH = 24


def looked_at(batch: Batch, *, passes: int = 1) -> Any:
    """(policy, what it saw)"""
    adapters = PeftAdapters(base())
    adapters.add_own(section("eva"))
    policy = CausalLM(adapters.model, adapters=adapters)
    observer = adapters.observer()
    assert isinstance(observer, Inputs)
    for _ in range(passes):
        with policy.adapters.using(None), observer.watching(torch.arange(LENGTH), LENGTH):
            hidden(policy, batch)
    return policy, observer


def test_a_begins_as_pefts_own() -> None:
    batch = packed(some_rows((LENGTH,)))
    policy, observer = looked_at(batch, passes=2)
    for parameter, value in observer.values():
        parameter.data.copy_(value)
    eva = EvaConfig(rho=1.0, use_label_mask=False)
    settings: Any = {"target_modules": "all-linear", "init_lora_weights": "eva", "eva_config": eva}
    eager = base()
    eager.set_attn_implementation("eager")
    theirs: Any = get_peft_model(eager, LoraConfig(r=4, lora_alpha=6, **settings), low_cpu_mem_usage=True)
    given = {"input_ids": batch.ids_BT, "attention_mask": torch.ones_like(batch.ids_BT)}
    initialize_lora_eva_weights(theirs, [given, given], show_progress_bar=False)
    expected = dict(theirs.base_model.model.named_parameters())
    ours = dict(policy.base.named_parameters())
    names = [name for name in ours if "lora_A" in name]
    assert len(names) == 14
    for name in names:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-3)
    assert not any(value.any() for name, value in ours.items() if "lora_B" in name)


def test_layers_of_one_input_share_its_directions_and_are_decomposed_once() -> None:
    policy, observer = looked_at(packed(some_rows((LENGTH,))))
    assert len({id(components) for components in observer._components.values()}) == 8  # qkv, o, gate and up, down; two layers
    attention = policy.base.model.layers[0].self_attn
    found = {id(parameter): value for parameter, value in observer.values()}
    q, k = (found[id(layer.lora_A[OWN].weight)] for layer in (attention.q_proj, attention.k_proj))
    assert torch.equal(q, k)
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=1e-4, rtol=0)


def test_fewer_tokens_than_a_decomposition_takes_wait_for_the_next_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 16)
    apart, together = Components(4, 16), Components(4, 16)
    apart.add(x[:7])
    assert apart.directions() is None
    apart.add(x[7:])
    together.add(x)
    found, expected = apart.directions(), together.directions()
    assert found is not None and expected is not None and torch.equal(found, expected)
