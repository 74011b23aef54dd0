"""Plain LoRA added to a weight by blocks of rows, and as PEFT merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.models.adapters import low_rank
from raytune_llm.models.adapters.low_rank import added
from raytune_llm.models.adapters.mergeable import Mergeable

NAME = "model.layers.0.mlp.down_proj.weight"
TARGETS = ["q_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "other ranks": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
}


def mergeable(folder: Path, **settings: Any) -> tuple[Mergeable, torch.Tensor]:
    """An adapter with values in it, and its base's weight NAME."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 16}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=2, **sizes))
    weight = base.get_parameter(NAME).detach().clone()
    shapes = {name.removesuffix(".weight"): list(value.shape) for name, value in base.named_parameters()}
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    get_peft_model(base, config).save_pretrained(folder)
    adapter = Mergeable(str(folder), "adapter.path")
    adapter.fit({layer: shapes[layer] for layer in adapter.layers})
    return adapter, weight


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_are_what_peft_merges(
    case: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "BLOCK_VALUES", 5 * 48)
    adapter, weight = mergeable(tmp_path, **CASES[case])
    weight = weight.to(dtype)
    expected = adapter.merged(NAME, weight)
    term = adapter.low_rank(NAME)
    assert term is not None
    assert (expected - weight.float()).abs().max() > 1e-3
    torch.testing.assert_close(added(weight.clone(), [term], lambda wide: wide), expected)
    own = weight.clone()
    made = added(own, [term], lambda wide: wide.to(dtype))
    assert made.data_ptr() == own.data_ptr()
    torch.testing.assert_close(made, expected.to(dtype))


def test_what_does_more_than_to_add_is_left_to_peft(tmp_path: Path) -> None:
    adapter, _ = mergeable(tmp_path, use_dora=True)
    assert adapter.changes(NAME) and adapter.low_rank(NAME) is None
