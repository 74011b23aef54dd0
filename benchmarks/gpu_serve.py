"""The engine on one GPU: random weights in the shape of Llama-3-8B, made on the device, prompts of 128 and answers of 128 tokens.

    scripts/bench gpu_serve [--shape llama3_8b] [--variants NAME ...] [--rows 1 8 32 128] [--profile FOLDER]

A variant that fails says so, and the others go on. Prints a table on standard error, and JSON: for each variant and number of
rows the tokens of answers a second over the whole batch, its prompts included, and of decoding alone. Adapters are of rank 8, one
of 16 a row. Text comes from a toy tokenizer: the host's time for a real one is not in it. --profile writes torch's tables there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from peft import LoraConfig

from benchmarks.gpu import SHAPES
from raytune_llm.config.quantization import FP8
from raytune_llm.data.batches import collate, to_device
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.bank_weights import write
from raytune_llm.models.adapters.banked import BankedLinear
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers
from raytune_llm.models.load import load_config, load_model
from raytune_llm.models.quantization import quantize

DEVICE = torch.device("cuda")
PROMPT, ANSWER, LONG = 128, 128, 8192
ADAPTERS, RANK, BLOCK_SIZE = 16, 8, 16
GOALS = {
    "adapters": {1: 140, 8: 950, 32: 3500, 128: 10000},
    "base": {1: 155, 8: 1100, 32: 4000, 128: 12000},
    "fp8": {1: 230},
}


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + id % 20000) for id in ids)


class Server:
    """A model with a bank of adapters, and engines over it."""

    def __init__(self, shape: str, folder: Path, *, fp8: bool = False) -> None:
        config = load_config(None, SHAPES[shape])
        self.config, self.folder, self.vocab_size = config, folder, config.vocab_size
        model = load_model(config, None, weights="random", dtype=torch.bfloat16, seed=0, device=DEVICE)
        attention.attach(model, "varlen")
        if fp8:
            quantize(layers(model), FP8(name="fp8", skip_modules=[]), DEVICE)
        self.bank = LoraBank(model, num_slots=ADAPTERS, max_rank=RANK, dtype=torch.bfloat16)
        self.policy = CausalLM(model, compute=torch.bfloat16, adapters=self.bank)
        self.policy.requires_grad_(False)

    def engine(self, rows: int, *, graphs: bool, threaded: bool = False, length: int = 1024) -> NativeEngine:
        runner = PolicyRunner(
            self.policy,
            num_blocks=max(rows * (PROMPT + ANSWER) * 2, LONG + BLOCK_SIZE) // BLOCK_SIZE + 64,
            block_size=BLOCK_SIZE,
            device=DEVICE,
            bank=self.bank,
            decode_rows=rows if graphs else 0,
            row_tokens=length,
        )
        return NativeEngine(
            runner, Tokenizer(), end_ids=[], max_length=length, max_rows=rows, step_tokens=LONG, prefix_cache=False,
            threaded=threaded,
        )  # fmt: skip

    def save_adapters(self, number: int) -> list[Path]:
        draw = torch.Generator(device=DEVICE).manual_seed(1)
        sizes = {
            name: (layer.a_GRK.shape[2], layer.b_GRO.shape[2])
            for name, layer in self.policy.base.named_modules()
            if isinstance(layer, BankedLinear)
        }
        folders = []
        for at in range(number):
            tensors = {
                name: tuple(
                    (torch.randn(shape, generator=draw, device=DEVICE) * 0.02).to(torch.bfloat16).cpu()
                    for shape in ((RANK, inputs), (outputs, RANK))
                )
                for name, (inputs, outputs) in sizes.items()
            }
            folder = self.folder / f"adapter{at}"
            write(folder, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"), tensors, base_model=None)  # type: ignore[arg-type]
            folders.append(folder)
        return folders

    def requests(self, rows: int, *, adapters: bool, tokens: int = ANSWER, prompt: int = PROMPT) -> list[Request]:
        draw = np.random.default_rng(rows)
        return [
            Request(
                prompt_ids=draw.integers(0, self.vocab_size, prompt).tolist(),
                adapter=f"a{row % ADAPTERS}" if adapters else None,
                sampling=Sampling(max_new_tokens=tokens, ignore_end=True),
            )
            for row in range(rows)
        ]


def add_adapters(engine: NativeEngine, folders: Sequence[Path]) -> None:
    for number in range(ADAPTERS):
        engine.add_adapter(f"a{number}", folders[number % len(folders)])


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def answers(
    server: Server,
    folders: Sequence[Path],
    rows_of: Sequence[int],
    profile: Path | None,
    *,
    adapters: bool,
    graphs: bool,
    name: str,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in rows_of:
        engine = server.engine(rows, graphs=graphs)
        try:
            if adapters:
                add_adapters(engine, folders)
            ask = partial(server.requests, rows, adapters=adapters)
            answer = partial(timed_answers, engine, ask)
            answer(4)
            took, first = min(answer(ANSWER) for _ in range(2)), min(answer(1) for _ in range(2))
            found[f"{rows}_rows"] = {
                "tokens_per_s": round(rows * ANSWER / took, 1),
                "decoding_tokens_per_s": round(rows * (ANSWER - 1) / (took - first), 1),
                "step_ms": round((took - first) / (ANSWER - 1) * 1e3, 3),
                "prompts_ms": round(first * 1e3, 1),
            }
            say(f"{name} {rows}: {found[f'{rows}_rows']}")
            if profile is not None and rows in (1, 32):
                with torch.profiler.profile() as profiler:
                    engine.generate(server.requests(rows, adapters=adapters, tokens=9))
                table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70)
                (profile / f"{name}-{rows}.txt").write_text(table)
        finally:
            engine.close()
        del engine
        clean()
    return found


def timed_answers(engine: NativeEngine, ask: Callable[..., list[Request]], tokens: int) -> float:
    requests = ask(tokens=tokens)
    return seconds(lambda: engine.generate(requests))


def same_tokens(server: Server, folders: Sequence[Path]) -> dict[str, Any]:
    """Rows whose greedy answers of 32 tokens are the same with graphs and without."""
    texts = []
    for graphs in (False, True):
        engine = server.engine(8, graphs=graphs)
        add_adapters(engine, folders)
        texts.append([one.ids for one in engine.generate(server.requests(8, adapters=True, tokens=32))])
        engine.close()
    different = len(set(texts[0]))
    return {"same": sum(a == b for a, b in zip(*texts, strict=True)), "of": 8, "different_answers": different}


def prefill(server: Server) -> dict[str, Any]:
    engine = server.engine(1, graphs=False, length=LONG + 8)
    took = min(seconds(lambda: engine.generate(server.requests(1, adapters=False, tokens=1, prompt=LONG))) for _ in range(4))
    engine.close()
    row = (np.zeros(LONG, np.int32), np.zeros(0, np.int32))
    batch = to_device(collate([[row]], length=LONG, pad_id=0), DEVICE)
    with torch.no_grad():
        forward = min(seconds(lambda: server.policy.hidden(batch, {})) for _ in range(4))
    return {"tokens_per_s": round(LONG / took), "forward_tokens_per_s": round(LONG / forward), "part": round(forward / took, 3)}


def from_disk(server: Server, folders: Sequence[Path]) -> dict[str, Any]:
    """An adapter from its folder to its first token, beside 8 rows that decode, and their longest wait meanwhile."""
    engine = server.engine(16, graphs=True, threaded=True)
    engine._runner.warm()  # type: ignore[attr-defined]
    for number in range(8):
        engine.add_adapter(f"a{number}", folders[number])
    engine.generate(server.requests(8, adapters=True, tokens=4))
    came: list[list[float]] = [[] for _ in range(8)]

    def follow(stream: Any, times: list[float]) -> None:
        for _ in stream:
            times.append(time.perf_counter())

    threads = [
        threading.Thread(target=follow, args=(engine.submit(request), times))
        for request, times in zip(server.requests(8, adapters=True, tokens=400), came, strict=True)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1)
    start = time.perf_counter()
    engine.add_adapter("new", folders[8])
    loaded = time.perf_counter()
    request = server.requests(1, adapters=False, tokens=8)[0]
    stream = engine.submit(Request(prompt_ids=request.prompt_ids, adapter="new", sampling=request.sampling))
    first = next(iter(stream)) and time.perf_counter()
    for thread in threads:
        thread.join()
    engine.close()
    steps = [after - before for times in came for before, after in pairwise(times)]
    during = [after - before for times in came for before, after in pairwise(times) if start < after and before < first]
    return {
        "first_token_s": round(first - start, 3),
        "read_s": round(loaded - start, 3),
        "longest_wait_ms": round(max(during) * 1e3, 1),
        "median_wait_ms": round(median(steps) * 1e3, 2),
    }


def warmed(server: Server) -> dict[str, Any]:
    engine = server.engine(32, graphs=True)
    took = seconds(engine._runner.warm)  # type: ignore[attr-defined]
    engine.close()
    return {"warm_s": round(took, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama3_8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--variants", nargs="+", default=None)
    parser.add_argument("--profile", type=Path, default=None)
    options = parser.parse_args()
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        server = Server(options.shape, folder)
        folders = server.save_adapters(ADAPTERS)
        say(f"built in {time.perf_counter() - started:.1f} s")
        timed = partial(answers, server, folders, profile=options.profile)
        variants: dict[str, Callable[[], dict[str, Any]]] = {
            "same_tokens": lambda: same_tokens(server, folders),
            "adapters": lambda: timed(options.rows, adapters=True, graphs=True, name="adapters"),
            "base": lambda: timed(options.rows, adapters=False, graphs=True, name="base"),
            "prefill": lambda: prefill(server),
            "from_disk": lambda: from_disk(server, folders),
            "warm": lambda: warmed(server),
            "eager_adapters": lambda: timed(options.rows[:3], adapters=True, graphs=False, name="eager_adapters"),
        }
        for name, variant in variants.items():
            if options.variants is None or name in options.variants:
                results[name] = attempt(variant)
        if options.variants is None or "fp8" in options.variants:
            del timed, variants, server
            clean()
            results["fp8"] = attempt(lambda: _fp8(options.shape, folder, options.profile))
    table(results)
    print(json.dumps(results, indent=1))


def _fp8(shape: str, folder: Path, profile: Path | None) -> dict[str, Any]:
    return answers(Server(shape, folder, fp8=True), [], [1], profile, adapters=False, graphs=True, name="fp8")


def attempt(variant: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        found = variant()
    except Exception as error:  # the others go on
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    clean()
    say(json.dumps(found))
    return found


def table(results: dict[str, Any]) -> None:
    for name, found in results.items():
        for rows, one in found.items():
            if isinstance(one, dict):
                number = int(rows.split("_")[0])
                say(f"{name:16} {number:4} rows {one['tokens_per_s']:9} tokens/s, goal {GOALS.get(name, {}).get(number, '-')}")
            else:
                say(f"{name:16} {rows} {one}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
