"""What the API asks of whatever computes: an engine in this process, or replicas behind a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from raytune_llm.engines.engine import AdapterState, Engine, Stats
from raytune_llm.engines.requests import Delta, Request
from raytune_llm.errors import ResourceError

RETRY_AFTER_S = 1.0
"""An overloaded server is worth asking again after this long."""

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
    keeps_seeds: bool = True
    """A seed gives the same answer again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """An engine's state, now."""

    engine: str
    """Its name among the server's engines."""
    stats: Stats
    adapters: Sequence[AdapterState]


class Overloaded(ResourceError):
    """As many requests wait as may wait."""

    def __init__(self) -> None:
        super().__init__("the server has as many requests as it takes", "Try again later.")

    def __reduce__(self):
        return Overloaded, ()


class Backend(Protocol):
    facts: ModelFacts

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        """Raises ConfigError or Overloaded before its first item where the request can't be computed, ResourceError where its
        engine is lost. Closing it cancels the request."""
        ...

    async def serves(self, adapter: str) -> bool:
        """It can be asked for. Quick: each request asks."""
        ...

    async def reports(self) -> Sequence[Report]:
        """One an engine."""
        ...

    async def pooled(self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None) -> list[list[float]]:
        """A vector a prompt; of a reward model, one number."""
        ...

    async def adapters(self) -> Sequence[AdapterState]: ...

    async def add_adapter(self, name: str, folder: str, *, pinned: bool) -> str: ...

    async def remove_adapter(self, name: str) -> None: ...

    async def pin(self, name: str, pinned: bool) -> None: ...


class InProcess:
    """An engine of this process."""

    def __init__(self, engine: Engine, facts: ModelFacts, *, max_waiting: int, name: str = "0") -> None:
        """max_waiting: requests that may wait."""
        self._engine, self.facts, self._max_waiting, self._name = engine, facts, max_waiting, name

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        async for deltas in self.batches(request):
            for delta in deltas:
                yield delta

    async def batches(self, request: Request) -> AsyncIterator[list[Delta]]:
        """All that came since the last time, at once."""
        if self._engine.stats().waiting >= self._max_waiting:
            raise Overloaded
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        # A grammar takes milliseconds to compile.
        submit = asyncio.to_thread(self._engine.submit, request) if request.sampling.grammar else None
        stream = self._engine.submit(request) if submit is None else await submit
        stream.on_news = lambda: loop.call_soon_threadsafe(news.set)
        try:
            while True:
                news.clear()
                if deltas := stream.take(timeout_s=0):
                    yield deltas
                    if deltas[-1].completion is not None:
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

    async def serves(self, adapter: str) -> bool:
        return self._engine.has_adapter(adapter)

    async def reports(self) -> Sequence[Report]:
        return [Report(engine=self._name, stats=self._engine.stats(), adapters=self._engine.adapters())]
