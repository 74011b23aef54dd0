"""Layers of multi-token prediction, which transformers does not load, are in what is saved of a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.load import load_config as load_run
from raytune_llm.data.tokens.tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
NEXT = {"num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
NEXT |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "qwen3_next": (NEXT, "mtp"),
    "glm4_moe": ({"n_routed_experts": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}, "model.layers.2"),
}
"""Sizes, and where the files have them."""


def base(folder: Path, family: str) -> dict[str, Tensor]:
    """The folder's layers of multi-token prediction, by name: copies of its last layer's, and a projection."""
    sizes, where = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **EXPERTS, **sizes), dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    last = "model.layers.1."
    into = where + ".layers.0." if where == "mtp" else where + "."
    more = {into + name.removeprefix(last): torch.randn_like(x) for name, x in weights.items() if name.startswith(last)}
    more[f"{where}.fc.weight" if where == "mtp" else f"{where}.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return more


def train(folder: Path, output: Path, *settings: str) -> tuple[Path, list[str]]:
    """final/, and what was said."""
    said: list[str] = []
    words = [
        "resources=inline",
        "model=hub",
        f"model.path={folder}",
        "data=commands",
        f"output_dir={output}",
        "data.packing=false",
    ]
    words += ["data.max_length=128", "data.max_samples=8", "train.global_batch_size=2", "train.max_steps=1"]
    words += ["train.precision=fp32"]
    result = api.train(load_run("train", [*words, *settings]), on_update=lambda update: said.append(str(update)))
    return result.final, said


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_that_is_saved_has_them_as_the_base_has(family: str, tmp_path: Path) -> None:
    more = base(tmp_path / "base", family)
    final, said = train(tmp_path / "base", tmp_path / "out", "adapter=none")
    saved = load_file(final / "model.safetensors")
    assert more.keys() <= saved.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert all(torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype for name, tensor in more.items())
    assert any(f"multi-token prediction: {len(more)} tensors of the base's files go into final/" in line for line in said)
    elsewhere, found = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not found["missing_keys"]
    assert all(name.startswith(FAMILIES[family][1]) for name in found["unexpected_keys"]), (
        "at its own sizes it knows them by number"
    )
    assert elsewhere(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_merged_model_has_them_too(tmp_path: Path) -> None:
    more = base(tmp_path / "base", "glm4_moe")
    _, said = train(tmp_path / "base", tmp_path / "out", "adapter=lora", "adapter.targets=[q_proj,v_proj]")
    assert not any("multi-token" in line for line in said)
    api.export(load_run("export", [f"export.run={tmp_path / 'out'}", f"export.output_dir={tmp_path / 'merged'}"]))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in more.items())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.config.num_hidden_layers=1"], "the model has other layers or tokens than the base"),
        (["model.new_tokens=[<light>]"], "the model has other layers or tokens than the base"),
    ],
)
def test_they_are_left_out_where_they_would_not_fit_and_that_is_said(settings: list[str], why: str, tmp_path: Path) -> None:
    more = base(tmp_path / "base", "glm4_moe")
    final, said = train(tmp_path / "base", tmp_path / "out", "adapter=none", *settings)
    saved = load_file(final / "model.safetensors")
    assert not more.keys() & saved.keys()
    assert any(f"are not in final/ ({why})" in line for line in said)
