"""The interface between the HTTP API and an engine: one in this process, or replicas behind a router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Literal, Protocol

from raytune_llm.engines.engine import AdapterState, Engine, Stats
from raytune_llm.engines.requests import Delta, NotFinite, Request, Sampling, Stream, TokenLogprob
from raytune_llm.errors import ResourceError

RETRY_AFTER_S = 1.0
"""The Retry-After header of a server that is over its limit."""

STALLED_S = 120.0
"""An engine without a heartbeat for so long has failed. Longer than the longest step, compilation included."""

Pooling = Literal["mean", "last", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about the base model that the API reports or checks requests against."""

    name: str
    max_length: int
    """Maximum tokens of a prompt and its answer together."""
    hidden_size: int
    scores: bool
    """The model is a reward model: it scores texts and can't generate."""
    keeps_seeds: bool = True
    """A seed gives the same answer again."""
    adapter_of: str | None = None
    """The base of which the model is an adapter, if it is one with its adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """The current state of an engine."""

    engine: str
    """The engine's name, unique within the server."""
    stats: Stats
    adapters: Sequence[AdapterState]
    failure: str | None = None
    """Why the engine answers no more. None: it runs."""


class Overloaded(ResourceError):
    """All rows are in use, and the queue of waiting requests is full (serve.max_waiting)."""

    def __init__(self) -> None:
        super().__init__("the server is at its limit of waiting requests", "Try again later.")

    def __reduce__(self):
        return Overloaded, ()


class Backend(Protocol):
    facts: ModelFacts

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The answer as it is generated. Raises ConfigError for an invalid request or Overloaded before the first item, and
        ResourceError if the engine fails. Closing the iterator cancels the request."""
        ...

    async def serves(self, adapter: str) -> bool:
        """Whether requests can use this adapter. Called for every request, so it must be fast."""
        ...

    async def reports(self) -> Sequence[EngineReport]:
        """One report per engine."""
        ...

    async def pooled(self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None) -> list[list[float]]:
        """One vector of hidden_size per prompt; with pooling=score, one number per prompt. Raises what `stream` does, and
        NotFinite."""
        ...

    async def prompt_logprobs(self, prompt: Sequence[int], adapter: str | None, top: int) -> list[TokenLogprob]:
        """The prompt's tokens after the first, each with the `top` likeliest ones in its place."""
        ...

    async def adapters(self) -> Sequence[AdapterState]: ...

    async def add_adapter(self, name: str, folder: str, *, pinned: bool) -> str:
        """Load or replace an adapter and return its version. Raises ConfigError or DataError and leaves the server as it was if
        the adapter doesn't fit."""
        ...

    async def remove_adapter(self, name: str) -> None: ...

    async def pin(self, name: str, pinned: bool) -> None:
        """A pinned adapter keeps its slot on the device."""
        ...


class InProcessBackend:
    """The backend of one engine in this process."""

    def __init__(self, engine: Engine, facts: ModelFacts, *, max_waiting: int, name: str = "0") -> None:
        """max_waiting: requests that may be here beside those that the engine computes at once, before further ones are
        rejected."""
        self._engine, self.facts, self._name = engine, facts, name
        self._max_requests = engine.max_rows + max_waiting
        self._compiling = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammars")
        self._requests = 0
        """Requests that are here. The engine's own counts say it later: it learns of them between two steps."""

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        async for deltas in self.batches(request):
            for delta in deltas:
                yield delta

    async def batches(self, request: Request) -> AsyncIterator[list[Delta]]:
        """Yields the list of all deltas since the previous one."""
        with self._one_more():
            loop, news = asyncio.get_running_loop(), asyncio.Event()
            # Compiling a grammar takes milliseconds to seconds and would block the event loop.
            stream = await self._submitted_apart(request) if request.sampling.grammar else self._engine.submit(request)
            stream.on_news = partial(_wake, loop, news)
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
        with self._one_more():
            vectors = await asyncio.wrap_future(self._engine.pooled(prompts, pooling, adapter))
        if not all(isfinite(sum(vector)) for vector in vectors):
            raise NotFinite(adapter)
        return vectors

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._requests >= self._max_requests:
            raise Overloaded
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _submitted_apart(self, request: Request) -> Stream:
        """Submit the request in a thread, since compiling its grammar may take long. A thread can't be stopped: if the caller is
        cancelled, the stream is cancelled as soon as it exists. The threads do nothing else, so that large grammars delay
        only grammars."""
        submitting = asyncio.get_running_loop().run_in_executor(self._compiling, self._engine.submit, request)
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel)
            raise

    async def prompt_logprobs(self, prompt: Sequence[int], adapter: str | None, top: int) -> list[TokenLogprob]:
        rest = list(prompt[1:])
        if not rest:
            return []
        with self._one_more():
            (scored,) = await asyncio.wrap_future(self._engine.answer_logprobs([list(prompt[:1])], [rest], adapter, top=top))
        if not isfinite(sum(one.logprob for one in scored)):
            raise NotFinite(adapter)
        return [TokenLogprob(token=token, logprob=one.logprob, top=one.top) for token, one in zip(rest, scored, strict=True)]

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

    async def reports(self) -> Sequence[EngineReport]:
        stats = self._engine.stats()
        return [EngineReport(engine=self._name, stats=stats, adapters=self._engine.adapters(), failure=failure_of(stats))]


def failure_of(stats: Stats) -> str | None:
    """Why an engine of this process answers no more. None: it runs."""
    silent_s = time.monotonic() - stats.last_step_at
    return stats.failure or (f"no heartbeat for {silent_s:.0f} s" if silent_s > STALLED_S else None)


def warm_up(engine: Engine) -> None:
    """Answer once, so that what is compiled or allocated at first use delays no user."""
    engine.submit(Request(prompt_ids=[0], sampling=Sampling(max_new_tokens=2, ignore_end=True))).result()


def _cancel(submitted: asyncio.Future[Stream]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    """Called by the engine's thread, which answers others too."""
    with suppress(RuntimeError):  # the event loop was closed before the answer was complete
        loop.call_soon_threadsafe(news.set)
