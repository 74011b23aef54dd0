"""Decoding on this machine's CPU, without HTTP: SmolLM2 in bf16, 8 rows with prompts of about 60 tokens, 32 new ones.

    scripts/bench decode [--runs 2]

Each case is a process of its own:

- `usual`: the engine as `serve` builds it, without adapters and with 8 and 16 of rank 8; and by kind of operation, how often a
  step calls it and how long it takes (a profile, which makes small operations slower).
- `unpacked`: adapters are not packed by their ranks (models/adapters/packs.py).
- `long_spins`: OpenMP's threads spin as long as they do by default (raytune_llm/spinning.py).
- `busy`, `busy_long_spins`: beside a process that keeps one core busy.
- `second_team`: another thread of the process has computed in parallel (engines/apart.py).

`step_ms` is the median time between two tokens of a row, `prompts_ms` the time until all rows have their first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from _rounds import Figures, add_arguments, measured

ROWS, PROFILED_TOKENS = 8, 10
LONG_SPINS = 300_000
"""OpenMP's default where there are no more threads than cores."""
OPERATIONS = {
    "products": "mkldnn::_linear_pointwise",
    "head": "aten::mm",
    "gathering_keys_and_values": "aten::index_select",
    "attention": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


@dataclass(frozen=True)
class Case:
    adapters: Sequence[int] = (0,)
    packs: bool = True
    profiles: bool = False
    spins: int | None = None
    """None: as the commands set it."""
    busy: bool = False
    second_team: bool = False


CASES = {
    "usual": Case(adapters=(0, 8, 16), profiles=True),
    "unpacked": Case(adapters=(8, 16), packs=False),
    "long_spins": Case(spins=LONG_SPINS),
    "busy": Case(busy=True),
    "busy_long_spins": Case(busy=True, spins=LONG_SPINS),
    "second_team": Case(second_team=True),
}


def in_process(name: str, folder: str) -> Figures:
    """A case's figures, from a process that measures it."""
    spins = CASES[name].spins
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {} if spins is None else {"GOMP_SPINCOUNT": str(spins)}
    command = [sys.executable, __file__, "--case", name, "--folder", folder]
    with busy_process() if CASES[name].busy else nullcontext():
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def figures(case: Case, folder: Path) -> Figures:
    from raytune_llm.spinning import spin_briefly

    spin_briefly()  # before torch is imported
    import torch
    from serve import make_adapters

    from raytune_llm.config.load import load_config
    from raytune_llm.models.onednn import OneDNN
    from raytune_llm.serve.engines import build_engine, tokenizer_of

    OneDNN.joins_adapters = case.packs
    if case.second_team:
        torch.rand(1000, 1000).matmul(torch.rand(1000, 1000))
    names = [f"a{number}" for number in range(max(case.adapters))]
    if names and not (folder / names[-1]).exists():
        make_adapters(folder, len(names))
    adapters = ", ".join(f"{name}: '{folder / name}'" for name in names)
    settings = ["model=smollm2_135m", "serve.precision=bf16", "serve.max_adapters=16", "serve.max_rank=8"]
    run = load_config("serve", [*settings, f"serve.adapters={{{adapters}}}"])
    engine, _ = build_engine(run.model, run.quantization, run.engine, run.serve)
    tokenizer, _ = tokenizer_of(run.model, run.serve)
    found: Figures = {}
    for number in case.adapters:
        begin = partial(begun, engine, tokenizer, names[:number] or [None], count())
        timed(begin)
        told = timed(begin) | (profiled(begin) if case.profiles else {})
        found |= {f"{f'{number}_adapters' if number else 'base'}_{name}": round(value, 3) for name, value in told.items()}
    engine.close()
    return found


def begun(engine: Any, tokenizer: Any, adapters: Sequence[str | None], seeds: Iterator[int]) -> list[Iterator[Any]]:
    """The streams of ROWS new prompts, each of which has given its first token."""
    from serve import NEW_TOKENS, questions

    from raytune_llm.engines.requests import Request, Sampling

    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_end=True)
    messages = [[{"role": "user", "content": question}] for question in questions(ROWS, next(seeds))]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]
    asked = [Request(prompt_ids=ids, adapter=adapters[row % len(adapters)], sampling=sampling) for row, ids in enumerate(prompts)]
    streams = [iter(engine.submit(request)) for request in asked]
    for stream in streams:
        next(stream)
    return streams


def timed(begin: Callable[[], list[Iterator[Any]]]) -> Figures:
    began = time.perf_counter()
    streams = begin()
    prompts_s = time.perf_counter() - began
    arrivals = [time.perf_counter() for _ in streams[0]]
    drain(streams)
    return {"prompts_ms": 1000 * prompts_s, "step_ms": 1000 * statistics.median(b - a for a, b in pairwise(arrivals))}


def profiled(begin: Callable[[], list[Iterator[Any]]]) -> Figures:
    """Of a decoding step: how often it calls each kind of operation, and how long they take together."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    streams = begin()
    all_threads = _ExperimentalConfig(profile_all_threads=True)  # the engine has its own
    with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as kept:
        for _ in zip(range(PROFILED_TOKENS), streams[0], strict=False):
            pass
    drain(streams)
    averages = {one.key: one for one in kept.key_averages()}
    steps = averages[OPERATIONS["head"]].count
    found: Figures = {}
    for name, operation in OPERATIONS.items():
        found |= {
            f"{name}_calls": averages[operation].count / steps,
            f"{name}_profiled": averages[operation].self_cpu_time_total / steps / 1000,
        }
    return found


def drain(streams: Sequence[Iterator[Any]]) -> None:
    for stream in streams:
        for _ in stream:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=2)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(figures(CASES[asked.case], asked.folder)))
        return
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        results = measured({name: partial(in_process, name, folder) for name in CASES}, asked)
    print(json.dumps(results | {"load_average": load_average}))


if __name__ == "__main__":
    main()
