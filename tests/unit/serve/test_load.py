"""Many clients, until they had many answers: every request is accounted for, and memory stays within bounds."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_llm import packaged
from tests.toy_engine import adapter_folder
from tests.unit.serve.conftest import KEY, Server

CLIENTS, ADAPTERS = 64, 16
TOY_ANSWERS, ANSWERS = 600, 3 * CLIENTS
TOY_SECONDS, SECONDS = 30, 120
"""The longest that is asked, on a slow machine."""
GROWTH_MIB = 40
SHAPES_MIB = 120
"""oneDNN keeps up to 1,024 kernels by the shapes of products; every number of prompt tokens in a step is another shape."""


@pytest.mark.long
def test_64_clients_and_16_adapters_are_all_answered_in_flat_memory(server: Server):
    names = [f"load{number}" for number in range(ADAPTERS)]
    for number, name in enumerate(names):
        server.engine.add_adapter(name, adapter_folder(server.root / name, number + 3))
    outcomes, sizes = asyncio.run(load(server.url, [*names, "base"], TOY_ANSWERS, TOY_SECONDS, os.getpid(), words=""))
    for name in names:
        server.engine.remove_adapter(name)
    until = time.monotonic() + 10
    while (stats := server.engine.stats()).running or stats.waiting:
        assert time.monotonic() < until, "rows of clients that went away are still there"
    assert set(outcomes) <= {"length", "stop", "429", "left"} and outcomes["length"] > 250, outcomes
    assert stats.cache_used == 0
    assert growth(sizes) < GROWTH_MIB, sizes


@pytest.fixture(scope="module")
def trained_like(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of rank 8 for SmolLM2, on every linear layer, with small random weights."""
    base = AutoModelForCausalLM.from_pretrained(packaged.resolve("HuggingFaceTB/SmolLM2-135M-Instruct"))
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    root, made = tmp_path_factory.mktemp("adapters"), {}
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_" in name:
                    weights.normal_(std=0.01)
        made[f"a{number}"] = root / f"a{number}"
        model.save_pretrained(made[f"a{number}"])
    return made


@pytest.fixture
def smollm2(trained_like: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The server's address and process: 32 rows, slots for half of the adapters. Memory of the cache is the process's from when
    it is first written, so it is small."""
    adapters = ", ".join(f"{name}: {folder}" for name, folder in trained_like.items())
    words = ["model=smollm2_135m", f"serve.adapters={{{adapters}}}", "serve.max_adapters=8", "serve.max_rank=8"]
    words += ["serve.port=0", "engine.cache_gib=0.25"]
    command = [sys.executable, "-m", "raytune_llm", "serve", *words, "serve.base_name=base", "serve.max_waiting=64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAYTUNE_LLM_API_KEY": KEY})
    assert process.stdout is not None
    try:
        yield next(line.split()[-1] for line in process.stdout if line.startswith("ready at ")), process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_smollm2_answers_64_clients_with_16_adapters(smollm2: tuple[str, int], trained_like):
    url, process = smollm2
    outcomes, sizes = asyncio.run(load(url, [*trained_like, "base"], ANSWERS, SECONDS, process, words="Tell me more about "))
    assert set(outcomes) <= {"length", "stop", "429", "left"} and outcomes["length"] > CLIENTS, outcomes
    until = time.monotonic() + 10
    while (held := gauges(url)) != {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}:
        assert time.monotonic() < until, held
    assert growth(sizes) < SHAPES_MIB, sizes


def gauges(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1]) for name in names}  # type: ignore[index]


async def load(
    url: str, models: list[str], answers: int, seconds: float, process: int, *, words: str
) -> tuple[dict[str, int], list[float]]:
    """How requests ended, by outcome, and MiB of the process's memory after each of so many answers."""
    outcomes: dict[str, int] = {}
    sizes: list[float] = []
    began = time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as http:
            while len(sizes) < answers and time.monotonic() - began < seconds:
                outcome = await _ask(http, draw, models, words)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                if outcome == "429":
                    await asyncio.sleep(0.2)
                elif outcome in ("length", "stop"):
                    sizes.append(_resident_mib(process))

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return outcomes, sizes


def growth(sizes: Sequence[float]) -> float:
    """MiB, from the second third of the answers to the last one: with the first one, memory is filled that is used later."""
    third = len(sizes) // 3
    return max(sizes[-third:]) - max(sizes[third : 2 * third])


def _resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _ask(http: httpx.AsyncClient, draw: random.Random, models: list[str], begin: str) -> str:
    """How the request ended: why the answer did, an error's status, or `left` where the client went away in the middle."""
    words = begin + "".join(draw.choices("abcdefgh ", k=draw.randrange(5, 60)))
    body = {
        "model": draw.choice(models), "messages": [{"role": "user", "content": words}], "max_tokens": draw.randrange(1, 40),
        "stream": draw.random() < 0.7, "seed": draw.randrange(9),
    }  # fmt: skip
    leaves = draw.random() < 0.05
    if not body["stream"]:
        response = await http.post("/v1/chat/completions", json=body)
        return str(response.status_code) if response.is_error else response.json()["choices"][0]["finish_reason"]
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            return str(response.status_code)
        finish = None
        async for line in response.aiter_lines():
            if leaves:
                return "left"
            if line == "data: [DONE]":
                assert finish is not None
                return finish
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                finish = chunk["choices"][0]["finish_reason"] or finish
    return "broken"
