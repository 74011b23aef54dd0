from __future__ import annotations

import json
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.export import memory
from tests.limits import export_in_memory


def test_a_model_is_compared_on_a_gpu_with_room_for_it_else_on_the_cpu():
    assert memory._device(100, 1000, 1000) == torch.device("cuda")
    assert memory._device(100, 1000, 50) == torch.device("cpu")
    assert memory._device(100, 1000, None) == torch.device("cpu")
    assert memory._device(100, 50, 1000) is None


def grouped(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(value)


def test_a_containers_limit_counts_and_so_does_that_of_a_group_around_it(tmp_path):
    """Of cgroup v2, and of v1 in the same folder."""
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n5:cpu:/\n4:memory:/old\n")
    assert memory.host_free_bytes(tmp_path, own) > 8000
    grouped(tmp_path / "outer" / "inner", memory__max="max\n", memory__current="10\n", memory__stat="anon 1\n")
    grouped(tmp_path / "outer", memory__max="9000\n", memory__current="2000\n", memory__stat="anon 5\ninactive_file 1000\n")
    assert memory.host_free_bytes(tmp_path, own) == 8000
    old = {"memory__limit_in_bytes": "600", "memory__usage_in_bytes": "700", "memory__stat": "total_inactive_file 0"}
    grouped(tmp_path / "memory" / "old", **old)
    assert memory.host_free_bytes(tmp_path, own) == 0


def test_without_groups_the_machines_memory_counts(tmp_path):
    assert 0 < memory.host_free_bytes(tmp_path, tmp_path / "nothing") <= psutil.virtual_memory().total


def saved(folder: Path, layers: int) -> Path:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.02) if weight.dim() > 1 else weight.data.fill_(1.0)
    model.save_pretrained(folder, max_shard_size="10MB")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_check_that_runs_out_of_memory_leaves_the_export_and_says_so(tmp_path):
    """200 MiB in float32 with 100 MiB of memory: more is free on the machine, and less may be taken."""
    small, large = saved(tmp_path / "small", 1), saved(tmp_path / "large", 20)
    words = [f"model.path={large}", f"export.output_dir={tmp_path / 'out'}", "export.check_rows=1", "export.shard_size=10MB"]
    first = [*words, f"model.path={small}", f"export.output_dir={tmp_path / 'first'}"]
    export_in_memory(100 * 2**20, words, after=first)
    assert json.loads((tmp_path / "first" / "export.json").read_text())["difference"] is not None
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["difference"] is None and "memory" in facts["unchecked"]
