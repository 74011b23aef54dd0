"""The engine on one GPU: random weights in the shape of a published model, prompts of 128 tokens, 128 new ones.

    scripts/bench gpu_serve [--rows 1 8 32 128] [--shape llama3_8b] [--adapters 16] [--bases none fp8] [--profile DIR] [--eager]

For each base and number of rows, without adapters and with each row's own of 16 of rank 8: tokens/s of whole answers, their
prompts included, and of decoding alone, from the steps in which every row decodes; a step's time. Then a prompt of 8,192 tokens
beside the training step's forward pass, and an adapter from its folder to its first token beside running rows. tests/gpu
compares what is fast here with what is plain. Prints a table last.

--profile writes tables of the kernels of eight decoding steps and of one step of 64 prompts, and what the engine's thread and the
thread that reads an adapter did during the longest wait of a running row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from gpu import SHAPES
from peft import LoraConfig
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from raytune_llm.config.load import load_config
from raytune_llm.config.serve import NativeEngine as NativeSettings
from raytune_llm.engines.native.build import Serving, native_engine
from raytune_llm.engines.requests import Request, Sampling

PROMPT, NEW = 128, 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Tokenizer:
    """A token a character, so that text costs little."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + id % 20000) for id in ids)


def engine_of(shape: str, base: str, rows: int, adapters: int, settings: dict[str, Any]) -> Any:
    random = [
        "model=hub",
        "model.path=null",
        "model.weights=random",
        "model.tokenizer=bytes",
        "++model.config={model_type: llama}",
    ]
    run = load_config("serve", [*random, f"quantization={base}"])
    config = AutoConfig.for_model(**SHAPES[shape])
    values = {"name": "native", "max_rows": rows, "step_tokens": 8192, "block_size": 16, "cache_gib": None, "gpu_memory": 0.9}
    native = NativeSettings(**values | {"prefix_cache": False, "compile": "auto"} | settings)
    return native_engine(
        native,
        Serving(
            model=run.model,
            quantization=run.quantization,
            config=config,
            tokenizer=Tokenizer(),
            end_ids=[],
            compute=torch.bfloat16,
            device=DEVICE,
            max_length=9216,
            max_adapters=max(adapters, 1),
            max_rank=8,
            max_host_adapters=64,
        ),
    )


def write_adapters(folder: Path, shape: str, number: int) -> list[Path]:
    """Random ones, of rank 8 on every linear layer."""
    config = AutoConfig.for_model(**SHAPES[shape])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    D, inner, kv = config.hidden_size, config.intermediate_size, head * config.num_key_value_heads
    sizes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, kv), "self_attn.v_proj": (D, kv), "self_attn.o_proj": (D, D)}
    sizes |= {"mlp.gate_proj": (D, inner), "mlp.up_proj": (D, inner), "mlp.down_proj": (inner, D)}
    made = []
    for one in range(number):
        torch.manual_seed(one)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for name, (inputs, outputs) in sizes.items():
                at = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(8, inputs) / inputs**0.5
                tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, 8) * 0.02
        made.append(folder / f"a{one}")
        made[-1].mkdir(parents=True)
        save_file(tensors, made[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(r=8, lora_alpha=16, target_modules=sorted(name.rpartition(".")[2] for name in sizes)).save_pretrained(made[-1])
    return made


def requests(rows: int, names: Sequence[str | None], new: int = NEW) -> list[Request]:
    draw = torch.Generator().manual_seed(rows)
    return [
        Request(
            prompt_ids=torch.randint(0, 100_000, (PROMPT,), generator=draw).tolist(),
            adapter=names[row % len(names)],
            sampling=Sampling(max_new_tokens=new),
        )
        for row in range(rows)
    ]


def arrivals(stream: Any) -> tuple[list[float], Any]:
    """When each piece of the answer came, and the answer."""
    times = []
    for delta in stream:
        times.append(time.perf_counter())
        if delta.completion is not None:
            return times, delta.completion
    raise AssertionError("a stream ends with a completion")


def timed(engine: Any, asked: list[Request]) -> dict[str, Any]:
    """Of all rows together; the decode rate from the median time between two tokens of a row."""
    started = time.perf_counter()
    streams = [engine.submit(request) for request in asked]
    times, first = arrivals(streams[0])
    completions = [first, *(stream.result() for stream in streams[1:])]
    seconds = time.perf_counter() - started
    step = statistics.median(after - before for before, after in pairwise(times))
    new = sum(len(completion.ids) for completion in completions)
    return {
        "tokens_per_s": round(new / seconds),
        "decode_tokens_per_s": round(len(asked) / step),
        "step_ms": round(step * 1000, 3),
        "first_token_ms": round((times[0] - started) * 1000, 1),
    }


def best(engine: Any, asked: list[Request], rounds: int = 2) -> dict[str, Any]:
    timed(engine, asked)
    return max((timed(engine, asked) for _ in range(rounds)), key=lambda result: result["tokens_per_s"])


def profiled(engine: Any, asked: list[Request], path: Path) -> None:
    """Eight steps or so in the middle of the answers."""
    streams = [engine.submit(request) for request in asked]
    deltas = iter(streams[0])
    for _ in range(20):
        next(deltas)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as kept:
        for _ in range(8):
            next(deltas)
    path.write_text(kept.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))
    for _ in deltas:
        pass
    for stream in streams[1:]:
        stream.result()


def profiled_prompts(engine: Any, asked: list[Request], path: Path) -> dict[str, float]:
    """One step with all prompts: the time from its start to the tokens, and the sum of its kernels' times."""

    def step() -> float:
        began: list[float] = []

        def wait_for_all() -> None:
            time.sleep(0.2)
            began.append(time.perf_counter())

        engine._calls.put(wait_for_all)
        for stream in [engine.submit(request) for request in asked]:
            stream.result()
        return time.perf_counter() - began[0]

    wall = min(step() for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as kept:
        step()
        torch.cuda.synchronize()
    averages = kept.key_averages()
    path.write_text(averages.table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))
    kernels = sum(one.self_device_time_total for one in averages if one.device_type.name == "CUDA")
    return {"wall_ms": round(wall * 1000, 1), "kernels_ms": round(kernels / 1000, 1)}


class Timeline:
    """When calls of an engine's functions began and ended, in all threads."""

    def __init__(self, engine: Any) -> None:
        self.calls: list[tuple[float, float, str, str]] = []
        """Start, end, name of the thread, name of the function."""
        self._places = [
            (engine._scheduler, "schedule"),
            (engine._runner, "run"),
            (engine, "_start"),
            (engine, "_read_tokens"),
            (engine, "_publish_all"),
            (engine._slots.bank, "load"),
            (engine._slots.bank, "clear"),
            (engine._store, "_read"),
        ]

    def __enter__(self) -> Timeline:
        self._before = [vars(holder).get(name) for holder, name in self._places]
        for holder, name in self._places:
            setattr(holder, name, partial(self._timed, getattr(holder, name), name))
        return self

    def __exit__(self, *_: Any) -> None:
        for (holder, name), before in zip(self._places, self._before, strict=True):
            if before is None:
                delattr(holder, name)
            else:
                setattr(holder, name, before)

    def _timed(self, function: Callable[..., Any], name: str, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            self.calls.append((started, time.perf_counter(), threading.current_thread().name, name))

    def during(self, start: float, stop: float) -> str:
        """The calls of a tenth of a millisecond or more between these times, in ms after the first of them."""
        inside = sorted(call for call in self.calls if call[1] > start and call[0] < stop and call[1] - call[0] > 1e-4)
        return "\n".join(f"{(a - start) * 1e3:8.1f} {(b - start) * 1e3:8.1f} {thread:10} {name}" for a, b, thread, name in inside)


def adapter_load(engine: Any, folder: Path, names: list[str | None], path: Path | None = None) -> dict[str, float]:
    """From its folder to its first token while 8 rows run, and the longest that one of them waited meanwhile. path: to write what
    happened during this wait."""
    streams = [engine.submit(request) for request in requests(8, [None, *names[:2]], 256)]
    times: list[float] = []
    watcher = threading.Thread(target=lambda: times.extend(arrivals(streams[0])[0]))
    watcher.start()
    time.sleep(0.5)
    timeline = Timeline(engine) if path is not None else None
    with timeline or contextlib.nullcontext():
        started = time.perf_counter()
        engine.add_adapter("fresh", folder)
        (fresh,) = requests(1, ["fresh"], 2)
        first = arrivals(engine.submit(fresh))[0][0] - started
        watcher.join()
    for stream in streams[1:]:
        stream.result()
    engine.remove_adapter("fresh")
    waits = [after - before for before, after in pairwise(times)]
    if timeline is not None and path is not None:
        longest = max(range(1, len(waits)), key=waits.__getitem__)
        path.write_text(timeline.during(times[longest], times[longest + 1]))
    return {
        "first_token_s": round(first, 3),
        "longest_wait_ms": round(max(waits[1:]) * 1000, 1),
        "median_wait_ms": round(statistics.median(waits) * 1000, 1),
    }


def prefill(engine: Any) -> dict[str, float]:
    ids = torch.randint(0, 100_000, (8192,)).tolist()
    asked = Request(prompt_ids=ids, adapter=None, sampling=Sampling(max_new_tokens=1))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        engine.submit(asked).result()
        times.append(time.perf_counter() - started)
    return {"tokens_per_s": round(8192 / min(times)), "seconds": round(min(times), 4)}


def clear() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--shape", default="llama3_8b")
    parser.add_argument("--bases", nargs="+", default=["none", "fp8"], help="quantization=")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--eager", action="store_true", help="steps as they are written, too")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_serve.py needs a GPU")
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": asked.shape}
    lines: list[str] = []

    def take(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            results[name] = measure()
        except Exception as error:
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        lines.append(f"{name:28} {json.dumps(results[name])}")
        print(lines[-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as root:
        folders = write_adapters(Path(root), asked.shape, asked.adapters + 1)
        ways = [("", "auto")] + ([(" as written", False)] if asked.eager else [])
        for base in asked.bases:
            for label, compile_ in ways:
                started = time.perf_counter()
                try:
                    engine = engine_of(asked.shape, base, max(asked.rows), asked.adapters, {"compile": compile_})
                except Exception as error:
                    traceback.print_exc()
                    take(f"{base}{label}", lambda error=error: {"failed": str(error)})
                    clear()
                    continue
                results[f"{base}{label} ready_s"] = round(time.perf_counter() - started, 1)
                print(f"{base}{label} ready in {results[f'{base}{label} ready_s']} s", file=sys.stderr, flush=True)
                for folder in folders[: asked.adapters]:
                    engine.add_adapter(folder.name, folder)
                names: list[str | None] = [folder.name for folder in folders[: asked.adapters]]
                engine.generate(requests(asked.adapters, names, 2))
                for rows in asked.rows:
                    for said, own in (("", [None]), (f" {asked.adapters} adapters", names)):
                        name = f"{base} {rows}{said}{label}"
                        take(name, lambda rows=rows, own=own, engine=engine: best(engine, requests(rows, own)))
                        if asked.profile is not None and not label:
                            asked.profile.mkdir(parents=True, exist_ok=True)
                            with contextlib.suppress(Exception):
                                profiled(engine, requests(rows, own), asked.profile / f"{name.replace(' ', '_')}.txt")
                if asked.profile is not None and not label:
                    for said, own in (("", [None]), (f" {asked.adapters} adapters", names)):
                        name, prompts = f"{base} step of 64 prompts{said}", requests(min(64, max(asked.rows)), own, 1)
                        path = asked.profile / f"{name.replace(' ', '_')}.txt"
                        take(name, lambda prompts=prompts, path=path, engine=engine: profiled_prompts(engine, prompts, path))
                    path = asked.profile / f"{base}_adapter_load.txt"
                    take(
                        f"{base} adapter load, timed",
                        lambda engine=engine, names=names, path=path: adapter_load(engine, folders[-1], names, path),
                    )
                if not label:
                    take(f"{base} prefill 8192", lambda engine=engine: prefill(engine))
                    take(f"{base} adapter load", lambda engine=engine, names=names: adapter_load(engine, folders[-1], names))
                engine.close()
                del engine
                clear()
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
