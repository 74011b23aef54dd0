"""A saved adapter that does not fit the model is refused by name, before it is anything's beginning."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.import_utils import is_bnb_available
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters import OWN, PeftAdapters, adapt, other_base
from raytune_llm.models.adapters.saved import read_config
from tests.models import lora_section, tiny_llama

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(20).view(2, 10)


lora = lora_section


def base() -> Any:
    model = tiny_llama().base
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapters = PeftAdapters(base())
    adapters.add_own(lora())
    for parameter in adapters.trained(OWN).values():
        nn.init.normal_(parameter)
    adapters.save(OWN, tmp_path, base_model="some/base")
    return tmp_path


def change(folder: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(changed(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_a_saved_adapter_is_continued_as_it_was(folder: Path) -> None:
    continued = adapt(base(), lora(path=str(folder))).model
    elsewhere = PeftModel.from_pretrained(base(), str(folder))
    torch.testing.assert_close(continued(IDS).logits, elsewhere(IDS).logits)
    assert not torch.equal(elsewhere(IDS).logits, base()(IDS).logits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda w: {name: w[name] for name in list(w)[1:]}, r"1 tensors are missing \(for example base_model"),
        (
            lambda w: {name.replace("q_proj", "query"): value for name, value in w.items()},
            r"are missing .*q_proj.* are not of this",
        ),
        (
            lambda w: {**w, "base_model.model.score.weight": torch.ones(1, 32)},
            r"1 tensors are not of .*score\.weight",
        ),
        (lambda w: {name: torch.cat([v, v]) for name, v in w.items()}, r"is \[\d+, \d+\] there and \[\d+, \d+\] here"),
    ],
    ids=["one is missing", "other names", "one too many", "other sizes"],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    changed: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, folder: Path
) -> None:
    change(folder, changed)
    with pytest.raises(
        ConfigError, match=rf"adapter\.path must be an adapter of this model.*{said}.* It was trained on some/base"
    ):
        adapt(base(), lora(path=str(folder)))


def test_an_adapter_of_another_base_is_refused_without_any_weights_of_a_model(folder: Path) -> None:
    with torch.device("meta"):
        other = base()
    other.model.layers = other.model.layers[:1]
    with pytest.raises(ConfigError, match=r"are not of this model \(.*layers\.1"):
        adapt(other, lora(path=str(folder)))


def test_an_adapter_on_layers_that_the_model_lacks_is_refused(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["c_attn"]}))
    with pytest.raises(ConfigError, match=r"adapter\.path must be an adapter of this model.*c_attn"):
        adapt(base(), lora(path=str(folder)))


def changed(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), r"must be a folder with adapter_model\.safetensors"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
            "must hold weights that can be read",
        ),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"must be a folder with adapter_config\.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"must hold an adapter_config\.json that PEFT reads"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"must hold an adapter_config\.json that PEFT reads"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), r"must hold an adapter_config\.json that PEFT reads"),
        (lambda folder: changed(folder, r="8"), r"must hold an adapter_config\.json that PEFT reads \(r is no number: '8'\)"),
    ],
)
def test_a_damaged_folder_is_an_error_of_its_setting(spoil: Callable[[Path], Any], said: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=rf"stage\.reference_adapter {said}"):
        adapt(base(), SavedAdapter(path=str(folder), setting="stage.reference_adapter"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"targets": ["q_proj", "query"]},
            r"adapter\.targets must name linear layers of the model, got \['query'\]. It has down_proj",
        ),
        ({"targets": []}, r"adapter\.targets must name linear layers"),
        ({"rank": 17}, r"adapter\.rank must be at most 16, the smaller side of k_proj, got 17"),
        ({"rank": 10**11}, r"adapter\.rank must be at most 32"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_has_weights(settings: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        model = base()
    with pytest.raises(ConfigError, match=said):
        adapt(model, lora(**settings))


def test_an_adapter_that_is_refused_leaves_the_model_and_its_adapters_as_they_were(folder: Path) -> None:
    model = adapt(base(), lora(path=str(folder))).model
    adapters, before = PeftAdapters(model), model(IDS).logits
    change(folder, lambda w: {name: w[name] for name in list(w)[1:]})
    with pytest.raises(ConfigError, match="must be an adapter of this model"):
        adapters.add("second", SavedAdapter(path=str(folder), setting="serve.adapters"))
    assert adapters.names == (OWN,)
    assert torch.equal(model(IDS).logits, before)
    bare = base()
    adapters, names, before = PeftAdapters(bare), list(bare.state_dict()), bare(IDS).logits
    with pytest.raises(ConfigError, match="must be an adapter of this model"):
        adapters.add("first", SavedAdapter(path=str(folder), setting="serve.adapters"))
    assert list(bare.state_dict()) == names
    torch.testing.assert_close(bare(IDS).logits, before)


@pytest.mark.parametrize("here", ["some/base", "/models/BASE", "/cache/models--some--base/snapshots/0123456789", ""])
def test_an_adapter_of_this_base_is_not_warned_of(folder: Path, here: str) -> None:
    assert other_base(str(folder), "adapter.path", here) is None


@pytest.mark.parametrize("here", ["some/base-instruct", "some/base with outputs/a/final merged"])
def test_an_adapter_that_names_another_base_is_warned_of(folder: Path, here: str) -> None:
    said = other_base(str(folder), "adapter.path", here)
    assert said is not None and f"was trained on some/base, not on {here}" in said


def test_a_stack_of_adapters_is_the_same_wherever_it_lies(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/base with outputs/a/final merged"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert other_base(str(folder), "adapter.path", "/models/base with /home/me/outputs/a/final merged") is None
    assert other_base(str(folder), "adapter.path", "some/base with outputs/b/final merged") is not None
    assert other_base(str(folder), "adapter.path", "some/base") is not None


def test_peft_finds_bitsandbytes_where_an_adapter_begins_by_it(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    loftq = config | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(loftq))
    read_config(str(folder), "adapter.path")
    assert is_bnb_available() == (find_spec("bitsandbytes") is not None)
