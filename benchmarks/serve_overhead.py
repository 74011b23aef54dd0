"""What Ray Serve and the router add to a token's way, and how many streams they hold, with an engine that computes nothing.

    python benchmarks/serve_overhead.py [--streams 1 8 400] [--tokens 40]

A token's text is the time at which the engine gave it, so a client on this machine knows how long it was under way. The same
engine and the same API serve in one process (`resources=inline`) and on Ray Serve (`resources=local`, two replicas); the
difference is what is added. Client, servers and all of Ray's processes share the machine's cores. Prints JSON: medians and 99th
percentiles in milliseconds, and how many streams ended whole. Goals: 4 ms added at the median of a single stream; 400 streams;
50 ms until a request that is too much is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

ROWS = 512
"""Streams that a stub engine has at once."""
PACE_S = 0.25
"""Between two tokens of a stream: 400 streams get 1,600 tokens a second."""


class StubEngine:
    """What the server needs of an engine (engines/engine.py), and no model: each stream gets a token every PACE_S, and the
    token's text is the time at which it was given. Streams beyond `rows` get theirs too, but count as waiting, so that the server
    refuses more. It has no adapters and no vectors."""

    max_length = 10_000

    def __init__(self, rows: int) -> None:
        self.max_rows = rows
        self._due: list[tuple[float, int, int, Any, Any]] = []
        self._news = threading.Condition()
        self._number = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Any) -> Any:
        from raytune_llm.engines.requests import Stream

        stream = Stream()
        with self._news:
            self._number += 1
            # Streams that come together don't get their tokens at one moment, as they don't of an engine with many batches.
            first = time.monotonic() + PACE_S * (self._number * 0.618 % 1)
            heapq.heappush(self._due, (first, self._number, 1, request, stream))
            self._news.notify()
        return stream

    def _run(self) -> None:
        while not self._closed:
            with self._news:
                self._news.wait_for(lambda: self._due, 0.2)
                wait_s = min(self._due[0][0] - time.monotonic(), 0.2) if self._due else 0.2
                if wait_s > 0:
                    self._news.wait(wait_s)
                    continue
                due, number, made, request, stream = heapq.heappop(self._due)
            if self._tell(made, request, stream):
                with self._news:
                    heapq.heappush(self._due, (due + PACE_S, number, made + 1, request, stream))

    def _tell(self, made: int, request: Any, stream: Any) -> bool:
        """Whether there is more to come."""
        from raytune_llm.engines.requests import Completion, Delta

        ends = made >= request.sampling.max_new_tokens or stream.cancelled.is_set()
        completion = Completion(ids=(1,) * made, text="", finish="length", prompt_tokens=len(request.prompt_ids))
        stream.put(Delta(text=f"{time.time_ns()} ", completion=completion if ends else None))
        return not ends

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        raise NotImplementedError

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        raise NotImplementedError

    def remove_adapter(self, name: str) -> None:
        raise NotImplementedError

    def has_adapter(self, name: str) -> bool:
        return False

    def adapters(self) -> list[Any]:
        return []

    def pin(self, name: str, pinned: bool) -> None:
        raise NotImplementedError

    def stats(self) -> Any:
        from raytune_llm.engines.engine import Stats

        counts: dict[str, Any] = dict.fromkeys(
            ["cache_used", "prefix_hits", "prefix_queries", "generated_tokens", "prompt_tokens", "preemptions"], 0
        )
        counts |= dict.fromkeys(["adapter_loads", "adapter_evictions", "steps"], 0)
        waiting = max(0, len(self._due) - self.max_rows)
        return Stats(
            running=len(self._due) - waiting,
            waiting=waiting,
            waiting_by_reason={},
            last_step_at=time.monotonic(),
            **counts,
        )

    def close(self) -> None:
        self._closed = True
        self._thread.join()


def stub_engine(run: Any) -> tuple[Any, Any]:
    """As `build_engine`, for a StubEngine of engine.max_rows rows."""
    from raytune_llm.serve.backend import ModelFacts

    return StubEngine(run.engine.max_rows), ModelFacts(name="base", max_length=StubEngine.max_length, hidden_size=1, scores=False)


def serve(resources: str, rows: int) -> None:
    """In a process of its own, until it is terminated. One request may wait for an engine."""
    from raytune_llm import load_config

    settings = ["model=tiny_random", "serve.port=0", "serve.drain_s=1", f"resources={resources}"]
    settings += [f"engine.max_rows={rows}", "serve.max_waiting=1"]
    if resources == "inline":
        serve_alone(load_config("serve", settings))
    else:
        from raytune_llm.serve.onray import serve_on_ray

        run = load_config("serve", [*settings, "serve.replicas=2"])
        with suppress(KeyboardInterrupt):
            serve_on_ray(run, notify=partial(print, flush=True), build=stub_engine)


def serve_alone(run: Any) -> None:
    """What `resources=inline` does, with the stub engine."""
    import uvicorn

    from raytune_llm.serve.access import access_of
    from raytune_llm.serve.api.app import build_app
    from raytune_llm.serve.backend import InProcessBackend
    from raytune_llm.serve.engines import tokenizer_of
    from raytune_llm.serve.port import bound
    from raytune_llm.serve.prompts import Prompts

    engine, facts = stub_engine(run)
    tokenizer, _ = tokenizer_of(run.model, run.serve)
    listening = bound(run.serve.host, 0)
    app = build_app(InProcessBackend(engine, facts, max_waiting=run.serve.max_waiting), Prompts(tokenizer), access_of(run))
    print(f"ready at http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)).run([listening])


@contextmanager
def server(resources: str, rows: int = ROWS) -> Iterator[int]:
    """Its port, once it is ready."""
    command = [sys.executable, __file__, "--serve", resources, "--rows", str(rows)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield next(int(line.rsplit(":", 1)[1]) for line in process.stdout if line.startswith("ready at"))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


async def stream(port: int, tokens: int) -> tuple[list[float], float, bool]:
    """Milliseconds that each token was under way, those until the first one came, and whether all came. Read as bytes: the client
    has its share of the cores too."""
    asked = {"model": "base", "prompt": "ab", "max_tokens": tokens, "stream": True}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first_ms, ways, whole = time.monotonic(), 0.0, [], False
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    async for line in reader:
        if b'"text": "' in line and (at := line.split(b'"text": "', 1)[1].split(b" ", 1)[0]):
            ways.append((time.time_ns() - int(at)) / 1e6)
            first_ms = first_ms or 1000 * (time.monotonic() - began)
        whole = whole or b"[DONE]" in line
    writer.close()
    return ways, first_ms, whole and len(ways) == tokens


async def measure(port: int, streams: int, tokens: int) -> dict[str, float]:
    await stream(port, 4)  # connections between processes are made
    began = time.monotonic()
    done = await asyncio.gather(*(stream(port, tokens) for _ in range(streams)))
    seconds = time.monotonic() - began
    ways = sorted(way for found, _, _ in done for way in found)
    return {
        "whole_streams": sum(whole for *_, whole in done),
        "token_p50_ms": round(statistics.median(ways), 2),
        "token_p99_ms": round(ways[int(0.99 * (len(ways) - 1))], 2),
        "first_token_p50_ms": round(statistics.median(first_ms for _, first_ms, _ in done), 1),
        "tokens_per_s": round(len(ways) / seconds, 1),
    }


async def refusals(port: int, asked: int = 50) -> dict[str, float]:
    """How long those wait who are refused, one after the other, while two engines of one row have as many as they take."""
    busy = [asyncio.create_task(stream(port, 400)) for _ in range(8)]
    await asyncio.sleep(2)
    refused = []
    for _ in range(asked):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b'{"model": "base", "prompt": "ab", "max_tokens": 4}'
        began = time.monotonic()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        status = await reader.readline()
        refused += [1000 * (time.monotonic() - began)] if b" 429 " in status else []
        writer.close()
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    refused.sort()
    return {
        "refused": len(refused),
        "asked": asked,
        "refused_p50_ms": round(statistics.median(refused), 1),
        "refused_p99_ms": round(refused[int(0.99 * (len(refused) - 1))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 400])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rows", type=int, default=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=["inline", "local"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rows)
        return
    results: dict[str, Any] = {}
    for resources in ("inline", "local"):
        with server(resources) as port:
            found = {str(number): asyncio.run(measure(port, number, arguments.tokens)) for number in arguments.streams}
        results[resources] = found
    with server("local", rows=1) as port:
        results["overload"] = asyncio.run(refusals(port))
    added = {
        number: round(results["local"][number]["token_p50_ms"] - results["inline"][number]["token_p50_ms"], 2)
        for number in results["local"]
    }
    results["added_p50"] = {f"{number}_ms": value for number, value in added.items()}
    print(json.dumps(results | {"load_average": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main()
