"""An adapter on a mixture's experts, merged from files to files, gives the logits of the base with the adapter in plain PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters import OWN, adapt
from tests.models import lora_section
from tests.unit.models.adapters.test_experts import mixture

IDS = torch.arange(40).remainder(90)[None]


def saved(folder: Path, model_type: str, **sizes: int) -> Path:
    tokenizer = byte_tokenizer()
    mixture(model_type, vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    adapted = adapt(loaded(base), lora_section(experts=True, **settings))
    torch.manual_seed(1)
    for parameter in adapted.trained(OWN).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save(OWN, folder, base_model=str(base))
    return folder


def exported(base: Path, place: Path, *settings: str) -> Any:
    return api.export(load_config("export", [f"model.path={base}", f"export.output_dir={place}", *settings]))


@pytest.mark.parametrize("settings", [{}, {"last_layers": 1}], ids=["all layers", "the last layer"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_merged_as_their_files_have_them(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = saved(tmp_path / "base", model_type)
    made = adapter_of(base, tmp_path / "adapter", **settings)
    expected = logits(PeftModel.from_pretrained(loaded(base), str(made)).eval())
    assert (logits(loaded(base)) - expected).abs().max() > 1e-3
    done = exported(base, tmp_path / "out", f"export.adapters={{a: '{made}'}}", "export.check_rows=2")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, atol=1e-5, rtol=1e-5)
    assert done.difference is not None and done.difference.max_abs < 1e-4
    exported(base, tmp_path / "under", f"model.merged_adapters=['{made}']", "export.check=false")
    torch.testing.assert_close(logits(loaded(tmp_path / "under")), expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_alone_says_which_programs_do_not_compute_it(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "qwen3_moe")
    made = adapter_of(base, tmp_path / "adapter")
    exported(base, tmp_path / "out", f"export.adapters={{a: '{made}'}}", "export.format=adapter", "export.check_rows=2")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vLLM: refused; it does not support `target_parameters`" in card
    expected = logits(PeftModel.from_pretrained(loaded(base), str(made)).eval())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(loaded(base), str(tmp_path / "out")).eval()), expected)


def test_experts_of_another_base_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = adapter_of(saved(tmp_path / "base", "qwen3_moe"), tmp_path / "adapter")
    other = saved(tmp_path / "other", "qwen3_moe", moe_intermediate_size=24)
    with pytest.raises(ConfigError, match=r"must be an adapter of this model: experts: .*lora_[AB] is \[.*there and \["):
        exported(other, tmp_path / "out", f"export.adapters={{a: '{made}'}}")
    assert not (tmp_path / "out").exists()


def test_lost_tensors_of_experts_are_told(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "qwen3_moe")
    made = adapter_of(base, tmp_path / "adapter")
    tensors = load_file(made / "adapter_model.safetensors")
    lost = next(name for name in tensors if ".experts." in name)
    save_file(
        {name: value for name, value in tensors.items() if name != lost}, made / "adapter_model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"must be an adapter of this model: experts: .* is not in its file"):
        exported(base, tmp_path / "out", f"export.adapters={{a: '{made}'}}")
