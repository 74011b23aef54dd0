"""Adapters by name on one model: which is at work, what is trained, what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.adapter import LoRA, SavedAdapter
from raytune_llm.models.adapters import OWN, PeftAdapters
from raytune_llm.models.vocabulary import grow
from tests.models import lora_section, tiny_llama

IDS = torch.arange(20).view(2, 10)


def base() -> Any:
    model = tiny_llama().base
    model.set_attn_implementation("eager")
    return model.eval()


def lora(rank: int = 4) -> LoRA:
    return lora_section(rank=rank)


def saved(folder: Path) -> SavedAdapter:
    return SavedAdapter(path=str(folder), setting="serve.adapters")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of three ranks."""
    made = []
    for rank in (2, 4, 8):
        adapters = PeftAdapters(base())
        adapters.add_own(lora(rank))
        torch.manual_seed(rank)
        for parameter in adapters.trained(OWN).values():
            nn.init.normal_(parameter, std=0.2)
        made.append(tmp_path_factory.mktemp("adapter") / "final")
        adapters.save(OWN, made[-1])
    return made


def alone(folder: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(base(), str(folder))(IDS).logits


def test_each_adapter_is_itself_while_it_is_used_and_the_base_is_bare_without(folders: list[Path]) -> None:
    model, bare = base(), base()(IDS).logits
    adapters = PeftAdapters(model)
    for number, folder in enumerate(folders):
        adapters.add(f"v1.{number}", saved(folder))
    assert adapters.names == ("v1.0", "v1.1", "v1.2") and adapters.max_rank == 8
    assert torch.equal(model(IDS).logits, bare)
    for number, folder in enumerate(folders):
        with adapters.using(f"v1.{number}"):
            torch.testing.assert_close(model(IDS).logits, alone(folder))
            with adapters.using(None):
                assert torch.equal(model(IDS).logits, bare)
    adapters.remove("v1.1")
    with adapters.using("v1.2"):
        torch.testing.assert_close(model(IDS).logits, alone(folders[2]))
    for name in adapters.names:
        adapters.remove(name)
    torch.testing.assert_close(model(IDS).logits, bare)
    assert list(model.state_dict()) == list(base().state_dict())


def test_using_another_adapter_changes_nothing_of_what_is_trained(folders: list[Path]) -> None:
    adapters = PeftAdapters(base())
    adapters.add_own(lora())
    trained = [name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad]
    assert sorted(adapters.trained(OWN)) == sorted(trained)
    adapters.add("other", saved(folders[0]))
    for name in ("other", None, OWN):
        with adapters.using(name):
            assert [name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad] == trained
    adapters.remove("other")
    assert [name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad] == trained


def test_an_adapter_is_saved_by_name_with_the_values_that_are_given(folders: list[Path], tmp_path: Path) -> None:
    adapters = PeftAdapters(base())
    for number, folder in enumerate(folders):
        adapters.add(str(number), saved(folder))
    adapters.save("1", tmp_path / "as it is")
    torch.testing.assert_close(alone(tmp_path / "as it is"), alone(folders[1]))
    halved = {name: p.detach() / 2 for name, p in adapters.base.named_parameters() if "lora_" in name}
    adapters.save("2", tmp_path / "halved", parameters=halved)
    assert not torch.allclose(alone(tmp_path / "halved"), alone(folders[2]), atol=1e-3)


def test_a_new_adapter_beside_others_is_frozen_and_not_at_work(folders: list[Path]) -> None:
    model = base()
    adapters, before = PeftAdapters(model), model(IDS).logits
    adapters.add("one", saved(folders[0]))
    adapters.add("two", lora())
    assert torch.equal(model(IDS).logits, before)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert not adapters.trained("two")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_adapter_over_a_base_in_16_bits_computes_without_autocast_too(family: str, tmp_path: Path) -> None:
    """Adapters are kept in float32, and engines call the model as it is."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, pad_token_id=0, **sizes)
    model, other = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for _ in range(2))
    own = PeftAdapters(other)
    own.add_own(lora())
    own.save(OWN, tmp_path)
    adapters = PeftAdapters(model.eval())
    adapters.add("served", saved(tmp_path))
    with torch.no_grad(), adapters.using("served"):
        assert model(IDS).logits.dtype == torch.bfloat16


def test_an_adapter_comes_after_the_first_one_went(folders: list[Path]):
    adapters = PeftAdapters(base())
    adapters.add("first", saved(folders[0]))
    adapters.add("second", saved(folders[1]))
    with adapters.using("second"):
        pass
    adapters.remove("first")
    adapters.add("third", saved(folders[2]))
    assert adapters.names == ("second", "third")
    for name in adapters.names:
        adapters.remove(name)
    assert adapters.names == ()


@pytest.mark.parametrize("whole", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_new_tokens_have_rows_of_their_own_where_a_matrix_is_not_trained_whole(whole: list[str]) -> None:
    model = base()
    grow(model, {97: [1, 2], 98: [3]})
    adapters = PeftAdapters(model)
    adapters.add_own(replace(lora(), modules_to_save=whole), [97, 98])
    trained = adapters.trained(OWN)
    for part in ("embed_tokens", "lm_head"):
        (own,) = (name for name in trained if part in name)
        assert ("modules_to_save" in own) == (part in whole) and len(trained[own]) == (99 if part in whole else 2)
    assert model(torch.tensor([[97, 98, 3]])).logits.shape[-1] == 99
