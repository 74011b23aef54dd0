"""What exports cost, and whether quantized ones reload with the perplexity that their cards say.

    scripts/bench export [--gib 2] [--formats fp8 w8a8 w4a16 nf4 gguf] [--python QUANTIZER] [--folder DIR]

Merging: a LoRA of rank 8 on all linear layers of random weights of --gib GiB in bf16 is merged from files to files, by a process
of its own. Its rate is compared with what the same disk takes to read and to write as many bytes, one after the other; the page
cache is emptied of the files before each reading, and writing ends with fsync. Formats: SmolLM2 135M on 32 rows of
examples/diary.jsonl; gguf is F16. gptq is calibrated on 64 others, and needs --python, a Python with llmcompressor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from raytune_llm import api, load_config, packaged
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.export.rows import rows_to_check
from raytune_llm.export.source import source_of
from raytune_llm.export.tensors import TensorFact, write

BLOCK = 16 * 2**20
HIDDEN, WIDE, RANK = 2048, 8192, 8
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
MERGE = """
import resource, sys, time
from raytune_llm import api, load_config
run = load_config("export", sys.argv[1:])
import raytune_llm.export.run
began = time.perf_counter()
api.export(run)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def make_base(folder: Path, num_bytes: int) -> None:
    tokenizer = byte_tokenizer()
    layer_bytes = 2 * sum(rows * columns for rows, columns in LINEARS.values())
    layers = max(1, round(num_bytes / layer_bytes))
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (len(tokenizer), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    facts = [TensorFact(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    write(folder, facts, 5 * 10**9, lambda name: torch.randn(shapes[name]).mul_(0.02).bfloat16(), lambda done: None)
    adapter = folder.with_name("adapter")
    adapter.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in LINEARS]
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(about))


def forget(folder: Path) -> None:
    """Empties the page cache of the files in it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(base: Path, place: Path) -> tuple[float, float]:
    """Bytes a second of reading the base's files, and of writing as much."""
    forget(base)
    files = sorted(base.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    block = bytearray(BLOCK)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    read = size / (time.perf_counter() - began)
    began = time.perf_counter()
    with place.open("wb", buffering=0) as file:
        for _ in range(size // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    wrote = size // BLOCK * BLOCK / (time.perf_counter() - began)
    place.unlink()
    return read, wrote


def merging(folder: Path, num_bytes: int) -> dict[str, float]:
    base = folder / "base"
    base.mkdir()
    make_base(base, num_bytes)
    read, wrote = disk_rates(base, folder / "zeros")
    forget(base)
    words = [f"model.path={base}", f"export.adapters={{a: {folder / 'adapter'}}}", f"export.output_dir={folder / 'merged'}"]
    done = subprocess.run(
        [sys.executable, "-c", MERGE, "model=hub", *words, "export.check=false"], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split()[-2:])
    began = time.perf_counter()
    forget(folder / "merged")
    seconds += time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / "merged").glob("*.safetensors"))
    return {
        "gib": size / 2**30,
        "read_mib_per_s": read / 2**20,
        "write_mib_per_s": wrote / 2**20,
        "merge_s": seconds,
        "share_of_the_disk": (size / read + size / wrote) / seconds,
        "peak_gib": peak / 2**30,
    }


def perplexity(folder: Path, rows: Any) -> float:
    """By plain transformers."""
    in_one = next((path.name for path in folder.glob("*.gguf")), None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=in_one).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in rows.ids:
            row = torch.from_numpy(ids.astype("int64"))[None]
            total += model(row, labels=row).loss.item() * (len(ids) - 1)
            tokens += len(ids) - 1
    return math.exp(total / tokens)


def quantized(folder: Path, format: str, python: str | None) -> dict[str, Any]:
    model = Path(packaged.resolve("HuggingFaceTB/SmolLM2-135M-Instruct"))
    place = folder / format
    words = ["model=smollm2_135m", "data=diary", f"data.cache={folder / 'tokens'}", "export.check_rows=32"]
    words += [f"export.format={format}", f"export.output_dir={place}", "export.max_kl=9", "export.calibration_rows=64"]
    words += ["export.dtype=fp16"] if format == "gguf" else []
    run = load_config("export", [*words, *([f"export.python={python}"] if python and format in ("gptq", "awq") else [])])
    began = time.perf_counter()
    done = api.export(run)
    seconds = time.perf_counter() - began
    assert done.difference is not None and done.difference.perplexity is not None
    found = perplexity(place, rows_to_check(source_of(run), run.data, run.export.check_rows))
    size = sum(path.stat().st_size for pattern in ("*.safetensors", "*.gguf") for path in place.glob(pattern))
    if format != "gguf":
        AutoTokenizer.from_pretrained(place)
    return {
        "export_s": seconds,
        "mb": size / 10**6,
        "perplexity_before": done.difference.perplexity_before,
        "perplexity_of_the_card": done.difference.perplexity,
        "perplexity_by_transformers": found,
        "divergence": done.difference.divergence,
        "base_mb": sum(path.stat().st_size for path in model.glob("*.safetensors")) / 10**6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="0: no merging")
    parser.add_argument("--formats", nargs="*", default=["fp8", "w8a8", "w4a16", "nf4", "gguf"])
    parser.add_argument("--python")
    parser.add_argument("--folder", help="on the disk that is measured")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="export-", dir=asked.folder) as name:
        folder = Path(name)
        if asked.gib:
            results["merging"] = merging(folder, int(asked.gib * 2**30))
        for format in asked.formats:
            results[format] = quantized(folder, format, asked.python)
    rounded = {name: {figure: round(value, 6) for figure, value in figures.items()} for name, figures in results.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(rounded | {"load_average": round(os.getloadavg()[0], 1), "own_peak_gib": round(peak, 2)}, indent=2))


if __name__ == "__main__":
    main()
