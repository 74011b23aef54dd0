"""Many clients for a while: every request is accounted for, and memory stays where it was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest

from tests.toy_engine import adapter_folder
from tests.unit.serve.conftest import KEY, Server

CLIENTS, ADAPTERS, SECONDS = 64, 16, 60
GROWTH_MIB = 40


@pytest.mark.long
def test_64_clients_and_16_adapters_are_all_answered_in_flat_memory(server: Server):
    names = [f"load{number}" for number in range(ADAPTERS)]
    for number, name in enumerate(names):
        server.engine.add_adapter(name, adapter_folder(server.root / name, number + 3))
    outcomes: dict[str, int] = {}
    sizes: list[float] = []
    began = time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            while time.monotonic() - began < SECONDS:
                outcome = await _ask(http, draw, [*names, "base"])
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                if outcome == "429":
                    await asyncio.sleep(0.2)

    async def watch() -> None:
        while time.monotonic() - began < SECONDS:
            sizes.append(_resident_mib())
            await asyncio.sleep(1)

    async def all_of_them() -> None:
        await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))

    asyncio.run(all_of_them())
    for name in names:
        server.engine.remove_adapter(name)
    until = time.monotonic() + 10
    while (stats := server.engine.stats()).running or stats.waiting:
        assert time.monotonic() < until, "rows of clients that went away are still there"
    assert set(outcomes) <= {"length", "stop", "429", "left"} and outcomes["length"] > 500, outcomes
    assert stats.cache_used == 0
    third = len(sizes) // 3
    assert max(sizes[-third:]) - max(sizes[:third]) < GROWTH_MIB, sizes


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _ask(http: httpx.AsyncClient, draw: random.Random, models: list[str]) -> str:
    """How the request ended: why the answer did, an error's status, or `left` where the client went away in the middle."""
    words = "".join(draw.choices("abcdefgh ", k=draw.randrange(5, 60)))
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
