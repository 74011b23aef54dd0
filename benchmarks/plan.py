"""What plan foretells of a run beside what the run takes: trained parameters, the adapter's file, and the memory of a step.

    scripts/bench plan [--only lora,optimizer=muon] [--tensors]

Prints JSON; --tensors says, too, which tensors are there at the peak, by shape, type and the operation that made them. Each run
takes three steps of a small Llama over full rows, all of whose tokens are trained, in float32 where there is no GPU; peaks are
those of the second and third step. `..._off` is the prediction over what was measured, less one; `off` names those that are more
than a tenth away. On a CPU the peak is of the tensors that are there at a time, by their storages.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import ConfigError
from raytune_llm.runs.worker import work

ON_GPU = torch.cuda.is_available()


def tokens(on_gpu: bool) -> int:
    """Of a row. On a GPU all is larger: blocks of memory would be large beside a small model."""
    return 2048 if on_gpu else 512


def fixed(on_gpu: bool) -> list[str]:
    scale = 4 if on_gpu else 1
    llama = {
        "model_type": "llama", "vocab_size": 2048 * scale, "hidden_size": 256 * scale, "intermediate_size": 704 * scale,
        "num_hidden_layers": 8, "num_attention_heads": 4 * scale, "num_key_value_heads": 2 * scale,
        "max_position_embeddings": 2048, "tie_word_embeddings": "false",
    }  # fmt: skip
    return [
        "model=tiny_random", f"model.config={{{','.join(f'{key}:{value}' for key, value in llama.items())}}}", "resources=inline",
        "tracking=none", "data=chat", "data.train_on_prompt=true", f"data.max_length={tokens(on_gpu)}", "data.eval_fraction=0",
        "train.max_steps=3", "train.epochs=100", "train.global_batch_size=1", "train.activation_checkpointing=none",
        "train.compile=false", *([] if on_gpu else ["train.precision=fp32"]),
    ]  # fmt: skip


ADAPTERS = {
    "none": [], "freeze": [], "llama_pro": [], "lora": [], "rslora": [], "lora_plus": [], "dora": [], "pissa": [], "eva": [],
    "oft": [], "vera": ["adapter.rank=64"], "ia3": [], "loftq": ["quantization=bnb_nf4"],
}  # fmt: skip
OPTIMIZERS = {
    "adafactor": [], "adam_mini": [], "adamw_8bit": [], "adamw_bf16": [], "apollo": [], "apollo_mini": [], "badam": [],
    "galore": ["optimizer.rank=32"], "lion": [], "muon": [], "schedule_free": ["schedule=constant"], "sgd": [],
    "lomo": ["train.max_grad_norm=null"], "adalomo": ["train.max_grad_norm=null"],
}  # fmt: skip
STAGES = {
    "pretrain": "text", "dpo": "chat_pairs", "orpo": "chat_pairs", "simpo": "chat_pairs", "cpo": "chat_pairs",
    "reward": "chat_pairs", "kto": "chat_labeled",
}  # fmt: skip
CASES = {
    **{f"adapter={name}": [f"adapter={name}", *words] for name, words in ADAPTERS.items()},
    **{f"quantization={name}": [f"quantization={name}"] for name in ("bnb_nf4", "bnb_fp4", "bnb_int8", "hqq")},
    "adapter=oft quantization=bnb_nf4": ["adapter=oft", "quantization=bnb_nf4"],
    "adapter=ia3 quantization=bnb_int8": ["adapter=ia3", "quantization=bnb_int8"],
    "adapter.dropout=0.1": ["adapter.dropout=0.1"],
    "adapter.rank=64": ["adapter.rank=64"],
    "adapter.last_layers=2": ["adapter.last_layers=2"],
    **{f"optimizer={name}": ["adapter=none", f"optimizer={name}", *words] for name, words in OPTIMIZERS.items()},
    **{f"stage={name}": [f"stage={name}", f"data={rows}"] for name, rows in STAGES.items()},
    "stage=dpo adapter=none": ["stage=dpo", "data=chat_pairs", "adapter=none"],
    "train.activation_checkpointing=full": ["train.activation_checkpointing=full"],
    "train.precision=bf16": ["train.precision=bf16"],
    "train.precision=bf16 adapter=none": ["train.precision=bf16", "adapter=none"],
    "train.micro_batch_size=2": ["train.micro_batch_size=2", "train.global_batch_size=2"],
}


class PeakBytes(TorchDispatchMode):
    """The most that tensors made within it take together at any time, and what they were then."""

    def __init__(self, but: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        """Bytes by shape, type and operation."""
        self._not_counted = {tensor.untyped_storage()._cdata for tensor in but}
        self._live: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._not_counted:
                made = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {func}"
                known = self._live.get(storage._cdata)
                if known is None or known[0].expired():
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), made
        self._live = {key: known for key, known in self._live.items() if not known[0].expired()}
        if (held := sum(size for _, size, _ in self._live.values())) > self.peak:
            self.peak, self.at_peak = held, Counter()
            for _, size, made in self._live.values():
                self.at_peak[made] += size
        return out


def write_rows(folder: Path, on_gpu: bool = ON_GPU) -> dict[str, Path]:
    """By data=: rows that are longer than data.max_length."""
    asked, answer, other = (
        [{"role": "user", "content": "?"}],
        {"role": "assistant", "content": "yes " * tokens(on_gpu)},
        "no " * tokens(on_gpu),
    )
    pair = {"messages": asked, "chosen": answer, "rejected": answer | {"content": other}}
    rows: dict[str, list[dict[str, Any]]] = {
        "chat": [{"messages": [*asked, answer]}],
        "text": [{"text": answer["content"]}],
        "chat_pairs": [pair],
        "chat_labeled": [{"messages": [*asked, answer], "label": label} for label in (True, False)],
    }
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name] * 8))
    return paths


def run_of(words: list[str], rows: Mapping[str, Path], folder: Path, on_gpu: bool = ON_GPU) -> TrainRun:
    data = next((word.partition("=")[2] for word in words if word.startswith("data=")), "chat")
    prompt = ["data.train_on_prompt=false"] if data != "chat" else []
    where = [f"data.path={rows[data]}", f"data.cache={folder / 'stores'}", f"output_dir={folder / 'run'}"]
    return load_config("train", [*fixed(on_gpu), *prompt, *where, *words])


def measured(run: TrainRun, tensors: bool) -> dict[str, Any]:
    device = torch.device("cuda" if ON_GPU else "cpu")
    held = PeakBytes()

    def stepped(step: int) -> None:
        """Peaks are counted from the first step's end: before it, weights are drawn and there is no optimizer state."""
        if ON_GPU and step == 1:
            torch.cuda.reset_peak_memory_stats()
        held.peak = 0 if step == 1 else held.peak
        tensors_at_peak.append(held.at_peak)
        peaks.append(torch.cuda.max_memory_allocated() if ON_GPU else held.peak)

    peaks: list[int] = []
    tensors_at_peak: list[Counter[str]] = []
    store = str(prepare(run.model, run.data, run.resources, kind=run.stage.kind).store.folder)
    with nullcontext() if ON_GPU and not tensors else held:
        work(run, store, None, device=device, on_step=stepped)
    for made, size in tensors_at_peak[-1].most_common(40 if tensors else 0):
        print(f"{size / 2**20:9.2f} MiB  {made}", file=sys.stderr)
    [file] = Path(run.output_dir, "final").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        values = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return {"peak_mib": peaks[-1] / 2**20, "file_mib": file.stat().st_size / 2**20, "saved": values}


def compared(words: list[str], rows: Mapping[str, Path], tensors: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(words, rows, Path(folder))
        foretold = api.plan(run)
        found = measured(run, tensors)
    planned = {
        "peak_mib": foretold.memory.total / 2**20,
        "file_mib": foretold.saved_bytes / 2**20,
        "saved": foretold.parameters.saved,
    }
    off = {f"{name.partition('_')[0]}_off": round(planned[name] / found[name] - 1, 4) for name in planned}
    rounded = {name: round(value, 3) for name, value in found.items()}
    return {"trained": foretold.parameters.trained, **rounded, **off}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases, separated by commas")
    parser.add_argument("--tensors", action="store_true", help="what is there at the peak")
    asked = parser.parse_args()
    only = set(filter(None, asked.only.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder))
        results = {}
        for name, words in CASES.items():
            if not only or name in only:
                try:
                    results[name] = compared(words, rows, asked.tensors)
                except ConfigError as error:  # a package that isn't installed here
                    print(name, error, file=sys.stderr, flush=True)
                    continue
                print(name, results[name], file=sys.stderr, flush=True)
    off = [name for name, found in results.items() if any(abs(found[key]) > 0.1 for key in found if key.endswith("_off"))]
    print(json.dumps({**results, "off": off}, indent=2))


if __name__ == "__main__":
    main()
