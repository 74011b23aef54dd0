from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError

pytestmark = pytest.mark.ray
SHARDS = ["export.shard_size=100KB", "export.check=false"]
NODES = ["resources=local", "resources.cpus_per_worker=1"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Of a base and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **shape))
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(str(folder / "adapter"))
    return [f"model.path={folder / 'base'}", f"export.adapters={{a: {folder / 'adapter'}}}"]


def exported(place: Path, *words: str) -> dict[str, bytes]:
    api.export(load_config("export", [f"export.output_dir={place}", *words]))
    return {file.name: file.read_bytes() for file in place.iterdir()}


def test_files_that_tasks_write_are_those_of_one_process(words, tmp_path):
    done: list[tuple[int, int]] = []
    here = exported(tmp_path / "here", *words, *SHARDS)
    run = load_config("export", [f"export.output_dir={tmp_path / 'nodes'}", *words, *SHARDS, *NODES])
    api.export(run, on_progress=lambda *bytes: done.append(bytes))
    there = {file.name: file.read_bytes() for file in (tmp_path / "nodes").iterdir()}
    assert sum(name.endswith(".safetensors") for name in here) > 3
    assert here == there
    assert done[-1][0] == done[-1][1] and len(done) > 3


def test_one_file_needs_no_index(words, tmp_path):
    assert "model.safetensors.index.json" not in exported(tmp_path / "nodes", *words, *NODES, "export.check=false")


def test_what_a_task_refuses_is_the_commands_error_and_leaves_nothing(words, tmp_path):
    base = Path(words[0].removeprefix("model.path="))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    large = tmp_path / "large"
    large.mkdir()
    for file in base.iterdir():
        (large / file.name).write_bytes(file.read_bytes())
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"export\.dtype can't hold model\.norm\.weight"):
        exported(tmp_path / "out", f"model.path={large}", *words[1:], *SHARDS, *NODES, "export.dtype=fp16")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out-export").exists()
