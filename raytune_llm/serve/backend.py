"""What the API asks of whatever computes: an engine in this process, or replicas behind a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from raytune_llm.engines.engine import AdapterState, Engine, Stats
from raytune_llm.engines.requests import Delta, Request

Pooling = Literal["mean", "last", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Of the base, as the API tells them."""

    name: str
    max_length: int
    """Tokens of a prompt and its answer, at most."""
    hidden_size: int
    scores: bool
    """It is a reward model: it gives texts a number and writes nothing."""


class Backend(Protocol):
    facts: ModelFacts

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        """Raises ConfigError before its first item where the request can't be computed. Closing it cancels the request."""
        ...

    async def pooled(self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None) -> list[list[float]]:
        """A vector a prompt; of a reward model, one number."""
        ...

    async def adapters(self) -> Sequence[AdapterState]: ...

    async def add_adapter(self, name: str, folder: str, *, pinned: bool) -> str: ...

    async def remove_adapter(self, name: str) -> None: ...

    async def pin(self, name: str, pinned: bool) -> None: ...

    async def stats(self) -> Stats: ...


class InProcess:
    """An engine of this process."""

    def __init__(self, engine: Engine, facts: ModelFacts) -> None:
        self._engine, self.facts = engine, facts

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        # A grammar takes milliseconds to compile.
        submit = asyncio.to_thread(self._engine.submit, request) if request.sampling.grammar else None
        stream = self._engine.submit(request) if submit is None else await submit
        stream.on_news = lambda: loop.call_soon_threadsafe(news.set)
        try:
            while True:
                news.clear()
                for delta in stream.take(timeout_s=0):
                    yield delta
                    if delta.completion is not None:
                        return
                await news.wait()
        finally:
            stream.cancel()

    async def pooled(self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None) -> list[list[float]]:
        return await asyncio.wrap_future(self._engine.pooled(prompts, pooling, adapter))

    async def adapters(self) -> Sequence[AdapterState]:
        return self._engine.adapters()

    async def add_adapter(self, name: str, folder: str, *, pinned: bool) -> str:
        return await asyncio.to_thread(self._engine.add_adapter, name, folder, pinned=pinned)

    async def remove_adapter(self, name: str) -> None:
        await asyncio.to_thread(self._engine.remove_adapter, name)

    async def pin(self, name: str, pinned: bool) -> None:
        self._engine.pin(name, pinned)

    async def stats(self) -> Stats:
        return self._engine.stats()
