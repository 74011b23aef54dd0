"""Models that come with their own code: unpacked if the code computes attention, and with a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llm import api
from raytune_llm.config.load import load_config as load_run
from raytune_llm.data.batches import collate
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.errors import ConfigError, UserError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.attention import shares_prefixes
from raytune_llm.models.attention.cache import check_cached
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import load_config
from raytune_llm.remote_code import announce
from tests.models import logits, lora_section, model_section, saved_llama, some_rows
from tests.own_code import CODE, with_own_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_own_code(tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(autouse=True)
def not_said_yet() -> None:
    announce.cache_clear()


def plain(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


def test_a_row_in_a_line_for_itself_gets_what_the_code_gives_the_row_alone(folder: Path) -> None:
    section = model_section(path=str(folder), trust_remote_code=True)
    config = load_config(str(folder), {}, trust_remote_code=True)
    settings = {"compute": torch.float32, "seed": 0, "device": torch.device("cpu")}
    model, choice = build_policy(config, section, lora_section(), **settings)
    assert isinstance(model, CausalLM) and "with unpacked rows" in choice
    model, rows = model.eval(), some_rows([7, 12, 9])
    batch = collate([[row] for row in rows], length=16, pad_id=0)
    whole = plain(folder)
    with torch.no_grad():
        alone = [whole(input_ids=torch.tensor(ids).long()[None]).logits[0, first - 1 : -1] for ids, (first, _) in rows]
        torch.testing.assert_close(model(batch, logits), torch.cat(alone), atol=2e-5, rtol=1e-4)
    model.train()(batch, cross_entropy).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all(parameter.grad is not None for parameter in trained)


def test_what_needs_packs_or_a_cache_knows_of_it(folder: Path) -> None:
    config = load_config(str(folder), {}, trust_remote_code=True)
    assert not shares_prefixes("auto", config)
    with pytest.raises(ConfigError, match=r"engine can't be native for own_way, whose own code computes attention.* engine=hf"):
        check_cached(config)


def run_of(folder: Path, output: Path, *settings: str) -> object:
    words = ["resources=inline", f"model.path={folder}", "model=hub", "data=commands", f"output_dir={output}"]
    of_data = ["data.max_length=128", "data.max_samples=8", "train.global_batch_size=2", "train.max_steps=2"]
    return load_run("train", [*words, *of_data, "model.trust_remote_code=true", *settings])


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_it_is_trained_and_what_is_saved_loads_elsewhere(adapter: str, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    result = api.train(run_of(folder, tmp_path / "out", "data.packing=false", f"adapter={adapter}"))
    assert result.summary.loss_last > 0
    again = PeftModel.from_pretrained(plain(folder), str(result.final)) if adapter == "lora" else plain(result.final)
    assert again(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_packs_of_it_are_refused_with_the_setting_that_gives_lines(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.packing must be false for own_way, .* Set data\.packing=false"):
        api.train(run_of(folder, tmp_path / "out", "data.packing=true"))


def test_recomputation_that_the_code_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.activation_checkpointing must be none for OwnForCausalLM .* Set none"):
        api.train(run_of(folder, tmp_path / "out", "data.packing=false", "train.activation_checkpointing=full"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("inputs_embeds=None, ", "", "a backbone, OwnModel, that takes no inputs_embeds"),
        ("return self.lm_head", "return None", r"no get_output_embeddings\(\)"),
        ('base_model_prefix = "transformer"', 'base_model_prefix = "other"', "no backbone under its base_model_prefix, 'other'"),
    ],
)
def test_code_that_lacks_what_is_called_is_refused_before_anything_is_prepared(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    code = CODE.replace(old, new)
    assert code != CODE
    folder = with_own_code(tmp_path / "model")
    (folder / "modeling_own.py").write_text(code)
    with pytest.raises(UserError, match=rf"model\.path must be a model whose code has .*: OwnForCausalLM has {said}"):
        api.train(run_of(folder, tmp_path / "out", "data.packing=false"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_code_is_said_loudly_once_and_before_it_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = with_own_code(tmp_path / "model")
    (folder / "modeling_own.py").write_text("raise ValueError('the code runs')")
    caplog.clear()
    for _ in range(2):
        with pytest.raises(ConfigError, match="the code runs"):
            load_config(str(folder), {}, trust_remote_code=True)
    (said,) = [record for record in caplog.records if record.name == "raytune_llm"]
    assert said.levelno == logging.WARNING
    text = said.getMessage()
    assert "model.trust_remote_code=true" in text and str(folder) in text and "modeling_own.OwnForCausalLM" in text


def test_so_is_a_tokenizers_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_llama(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.Slow", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text("raise ValueError('the code runs')")
    caplog.clear()
    with pytest.raises(ConfigError):
        load_tokenizer(str(folder), trust_remote_code=True)
    assert ["tokenization_own.Slow" in record.getMessage() for record in caplog.records if record.name == "raytune_llm"] == [True]


def test_without_trust_the_error_names_the_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        load_config(str(folder), {})


def test_nothing_is_said_of_a_model_without_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(str(saved_llama(tmp_path)), {}, trust_remote_code=True)
    assert not [record for record in caplog.records if record.name == "raytune_llm"]
