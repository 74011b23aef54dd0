"""What comes after training, for a run that was really trained: two steps of LoRA on a small model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.saved import rank_of
from raytune_llm.models.generation_config import end_ids_of
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.runs.trained import Trained, read_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chat_rows: str, cache: str) -> Path:
    root = tmp_path_factory.mktemp("trained")
    tokenizer: Any = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    settings = [
        f"model.path={root / 'base'}", f"data.path={chat_rows}", f"data.cache={cache}", f"output_dir={root / 'out'}", "name=mine",
        "resources=inline", "tracking=none", "train.max_steps=2", "train.global_batch_size=4", "data.eval_fraction=0.1",
        "optimizer.lr=0.05", "train.compile=false", "data.default_system=Be brief.",
    ]  # fmt: skip
    api.train(load_config("train", settings))
    return root / "out"


def test_predict_asks_a_run_with_its_adapter_and_its_own_system_text(trained, chat_rows, tmp_path):
    settings = [f"predict.run={trained}", f"data.path={chat_rows}", f"output_dir={tmp_path / 'out'}", "data.max_samples=2"]
    done = api.predict(load_config("predict", [*settings, "predict.max_new_tokens=5", "predict.precision=fp32"]))
    assert done.models == ("mine",)
    first = json.loads((done.folder / "predictions.jsonl").read_text().splitlines()[0])
    messages = [{"role": "system", "content": "Be brief."}, *first["messages"][:-1]]
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "final")
    base: Any = AutoModelForCausalLM.from_pretrained(trained.parent / "base")
    loaded: Any = PeftModel.from_pretrained(base, str(trained / "final"))
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = loaded.eval().generate(**asked, max_new_tokens=5, do_sample=False)
    assert first["predict"] == tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_export_merges_a_run_and_compares_it_on_its_held_out_rows(trained, tmp_path):
    done = api.export(load_config("export", [f"export.run={trained}", f"export.output_dir={tmp_path / 'out'}"]))
    assert done.difference is not None and done.difference.max_abs < 1e-4  # of log-probabilities of tens of nats
    assert "held-out rows of the run" in done.difference.rows
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert 257 in end_ids_of(merged.generation_config)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_evaluate_puts_a_run_and_its_base_side_by_side(trained, tmp_path):
    place = tmp_path / "evaluation" / "mmlu"
    place.mkdir(parents=True)
    (place / "mapping.json").write_text(json.dumps({"virology": {"name": "virology", "category": "Other"}}))
    with ZipFile(place / "mmlu.zip", "w") as archive:
        archive.writestr("data/test/virology_test.csv", "What?,a,b,c,d,A\nWho?,e,f,g,h,B\n")
        archive.writestr("data/dev/virology_dev.csv", "Where?,a,b,c,d,C\n")
    settings = [
        f"evaluate.models=[{trained}]",
        "evaluate.base=true",
        "evaluate.tasks=[mmlu_test]",
        f"output_dir={tmp_path / 'out'}",
    ]
    done = api.evaluate(load_config("evaluate", [*settings, f"evaluate.data={place.parent}"]))
    assert list(done.scores) == ["base", "mine"]
    assert all(score["mmlu_test"]["Average"].beside["questions"] == 2 for score in done.scores.values())


def test_damaged_weights_of_a_finished_run_are_refused_and_edited_settings_are_said(trained, tmp_path, caplog):
    copy = shutil.copytree(trained, tmp_path / "run") / "final"
    (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + "\n")
    assert rank_of(str(copy), "adapter.path") == 8
    assert "adapter_config.json has changed since" in caplog.text
    weights = copy / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + bytes(255 - byte for byte in content[-8:]))
    with pytest.raises(
        ConfigError, match=r"adapter\.path must be as the run .* wrote it: adapter_model\.safetensors has changed"
    ):
        rank_of(str(copy), "adapter.path")
    with pytest.raises(ConfigError, match=r"export\.run must be as the run"):
        api.export(load_config("export", [f"export.run={copy.parent}", f"export.output_dir={tmp_path / 'out'}"]))


def test_a_damaged_model_of_a_finished_run_is_refused(tmp_path):
    final = tmp_path / "run" / "final"
    LlamaConfig().save_pretrained(final)
    (final / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"others").hexdigest()
    (final.parent / "finished.json").write_text(json.dumps({"files": {"final/model.safetensors": digest}}))
    with pytest.raises(ConfigError, match=r"model\.path must be as the run that finished there wrote it: model\.safetensors"):
        load_model_config(str(final), {})
    (final.parent / "finished.json").unlink()
    load_model_config(str(final), {})


def test_what_was_put_into_a_model_before_it_was_trained_whole_is_not_put_into_it_again(tmp_path):
    words = [
        "adapter=none",
        "model.path=base",
        "model.merged_adapters=[one]",
        "model.new_tokens=['<a>']",
        "model.resize_vocab=true",
    ]
    run = load_config("train", ["data.path=x", "model.config={rope_theta: 5.0}", *words])
    model = Trained(run, tmp_path / "final").model
    assert (model.path, model.config, model.merged_adapters) == (str(tmp_path / "final"), {}, [])
    assert (model.new_tokens, model.resize_vocab) == (None, False)


@pytest.mark.parametrize("text", [b"", b"- 1", b"a: [1", b"bogus: 1", b"\xff"])
def test_a_run_whose_settings_cannot_be_read_is_named_by_the_setting_that_was_given(tmp_path, text):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"^export\.run must be the output folder of a run, with the run\.yaml that it wrote"):
        read_trained(str(tmp_path), "export.run")
