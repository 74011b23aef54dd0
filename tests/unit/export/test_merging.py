"""A merged adapter of any kind gives the logits of the base with the adapter in plain PEFT: exported, and as models load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters import OWN, PeftAdapters, merge
from tests.unit.models.adapters.test_kinds import KINDS, section

IDS = torch.arange(40).remainder(256)[None]
LORA: dict[str, Any] = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
OF_PEFT = {
    "vera that brings its matrices": VeraConfig(
        r=6, target_modules=["k_proj", "o_proj", "down_proj"], save_projection=True, init_weights=False, task_type="CAUSAL_LM"
    ),
    "ia3 of outputs alone": IA3Config(
        target_modules=["q_proj", "k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
}
"""As other programs save them."""


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of several sizes, some with biases that are not 0."""
    return saved(tmp_path_factory.mktemp("models") / "base", tied=request.param == "tied")


def saved(folder: Path, *, tied: bool) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", tie_word_embeddings=tied, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def learned(adapters: PeftAdapters, folder: Path) -> Path:
    torch.manual_seed(1)
    for parameter in adapters.trained(OWN).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapters.save(OWN, folder)
    return folder


def of_kind(kind: str, base: Path, folder: Path, *overrides: str) -> Path:
    adapters = PeftAdapters(loaded(base))
    adapters.add_own(section(kind, *overrides))
    return learned(adapters, folder)


def of_peft(config: Any, base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    get_peft_model(loaded(base), copy.deepcopy(config)).save_pretrained(str(folder))
    return folder


def exported(base: Path, place: Path, *settings: str) -> Any:
    return api.export(
        load_config("export", [f"model.path={base}", f"export.output_dir={place}", "export.check=false", *settings])
    )


@pytest.mark.parametrize("kind", [*KINDS, *OF_PEFT])
def test_a_merged_adapter_is_the_base_and_the_adapter_in_peft(kind: str, base: Path, tmp_path: Path) -> None:
    made, folder = tmp_path / "adapter", tmp_path / "out"
    _ = of_kind(kind, base, made) if kind in KINDS else of_peft(OF_PEFT[kind], base, made)
    in_peft = PeftModel.from_pretrained(loaded(base), str(made)).eval()
    expected = logits(in_peft)
    assert (logits(loaded(base)) - expected).abs().max() > 1e-2

    exported(base, folder, f"export.adapters={{a: '{made}'}}")
    torch.testing.assert_close(logits(loaded(folder)), expected, atol=1e-5, rtol=1e-5)
    exported(base, tmp_path / "under", f"model.merged_adapters=['{made}']")
    torch.testing.assert_close(logits(loaded(tmp_path / "under")), expected, atol=1e-5, rtol=1e-5)
    merge(model := loaded(base), [str(made)])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "vera", "ia3"])
def test_weights_of_inputs_by_outputs_are_merged_as_such(kind: str, tmp_path: Path) -> None:
    """GPT-2's, of which some are square."""
    base, made, folder = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    more = ["adapter.scaled_inputs=[c_fc]"] if kind == "ia3" else []
    of_kind(kind, base, made, "adapter.targets=[c_attn,c_proj,c_fc]", *more)
    expected = logits(PeftModel.from_pretrained(loaded(base), str(made)).eval())
    assert (logits(loaded(base)) - expected).abs().max() > 1e-2
    exported(base, folder, f"export.adapters={{a: '{made}'}}")
    torch.testing.assert_close(logits(loaded(folder)), expected, atol=1e-5, rtol=1e-5)
    exported(base, tmp_path / "under", f"model.merged_adapters=['{made}']")
    torch.testing.assert_close(logits(loaded(tmp_path / "under")), expected, atol=1e-5, rtol=1e-5)


def test_the_sum_of_adapters_holds_the_biases_of_each(base: Path, tmp_path: Path) -> None:
    one, two = (of_kind(kind, base, tmp_path / kind) for kind in ("ia3", "lora"))
    exported(base, tmp_path / "out", f"export.adapters={{a: '{one}', b: '{two}'}}", "export.weights={a: 0.5}")
    merge(first := loaded(base), [str(one)])
    before, after, found = (model.state_dict() for model in (loaded(base), first, loaded(tmp_path / "out")))
    name = "model.layers.1.self_attn.k_proj.bias"
    torch.testing.assert_close(found[name], (before[name] + after[name]) / 2)


ON_ONE_END = {
    "the embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"], **LORA),
    "the head": LoraConfig(target_modules=["lm_head", "q_proj"], **LORA),
    "the whole embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA),
}


@pytest.mark.parametrize("end", ON_ONE_END)
def test_an_adapter_on_one_end_of_a_tied_model_is_not_merged_and_is_exported_alone(end: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=True)
    made = of_peft(ON_ONE_END[end], base, tmp_path / "adapter")
    said = r"can't be merged: it changes (model\.embed_tokens|lm_head)\.weight, but the embedding and the head are tied"
    with pytest.raises(ConfigError, match=said):
        merge(loaded(base), [str(made)])
    for settings in (f"export.adapters={{a: '{made}'}}", f"model.merged_adapters=['{made}']"):
        with pytest.raises(ConfigError, match=said):
            exported(base, tmp_path / "out", settings)
    exported(base, tmp_path / "out", f"export.adapters={{a: '{made}'}}", "export.format=adapter")
    found = PeftModel.from_pretrained(loaded(base), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(found), logits(PeftModel.from_pretrained(loaded(base), str(made)).eval()))


def test_an_adapter_on_one_end_of_an_untied_model_is_merged(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tied=False)
    for number, config in enumerate(ON_ONE_END.values()):
        made = of_peft(config, base, tmp_path / f"adapter{number}")
        exported(base, tmp_path / f"out{number}", f"export.adapters={{a: '{made}'}}")
        expected = logits(PeftModel.from_pretrained(loaded(base), str(made)).eval())
        torch.testing.assert_close(logits(loaded(tmp_path / f"out{number}")), expected, atol=1e-5, rtol=1e-5)


def test_what_takes_from_a_weight_can_not_be_on_the_head_that_is_the_embedding_too(tmp_path: Path) -> None:
    adapters = PeftAdapters(loaded(saved(tmp_path / "base", tied=True)))
    with pytest.raises(ConfigError, match=r"adapter\.targets can't name lm_head, which is tied to the embedding"):
        adapters.add_own(section("pissa", "adapter.targets=[lm_head,q_proj]"))
