"""The deltas of a request's answers: merged, timed, sent as server-sent events, and cancelled if the client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from raytune_llm.engines.requests import Delta
from raytune_llm.errors import UserError
from raytune_llm.serve.api.errors import APIError, api_error, broken
from raytune_llm.serve.api.metrics import Metrics
from raytune_llm.serve.api.responses import ChatResponse, CompletionResponse, Usage

log = logging.getLogger("raytune_llm.serve")


@dataclass(slots=True)
class LatencyTimer:
    """Records the latencies of one request in the metrics, separately for each of its answers, as in vLLM."""

    metrics: Metrics
    model: str
    began: float
    latest: dict[int, float] = field(default_factory=dict)
    """Choice index -> time of its last delta."""

    def observe(self, index: int, delta: Delta) -> None:
        now, before = time.monotonic(), self.latest.get(index)
        if before is None:
            self.metrics.first_token_s.labels(self.model).observe(now - self.began)
        else:
            self.metrics.between_tokens_s.labels(self.model).observe(now - before)
        self.latest[index] = now
        if delta.completion is not None:
            self.metrics.request_s.labels(self.model).observe(now - self.began)
            if delta.completion.queued_s is not None:
                self.metrics.queue_s.labels(self.model).observe(delta.completion.queued_s)
            self.metrics.success.labels(self.model, delta.completion.finish).inc()


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """The items of all streams as they arrive, each with the index of its stream."""
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]


async def with_first(first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for item in rest:
        yield item


async def events(
    first: tuple[int, Delta],
    rest: AsyncIterator[tuple[int, Delta]],
    response: ChatResponse | CompletionResponse,
    include_usage: bool,
    timer: LatencyTimer,
) -> AsyncIterator[str]:
    """Server-sent events. An error during the stream is sent as an event with an error object and ends the stream."""
    usage = Usage()
    try:
        async for index, delta in with_first(first, rest):
            timer.observe(index, delta)
            usage.add(delta)
            for chunk in response.chunks(index, delta, usage=None if not include_usage else "later"):
                yield _event(chunk)
        if include_usage:
            yield _event(response.usage_chunk(usage))
        yield "data: [DONE]\n\n"
    except UserError as error:
        yield _event(api_error(error).body)
    except Exception as error:
        log.exception("a stream failed")
        yield _event(broken(f"The engine failed: {type(error).__name__}").body)
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _event(data: dict[str, Any]) -> str:
    """The event in ASCII, since some clients take characters such as U+2028 for line breaks."""
    return f"data: {json.dumps(data)}\n\n"


async def before_disconnect(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client disconnects first, so that its rows are free at the next step."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "The client disconnected")
    finally:
        for one in (task, disconnected):
            one.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects. The request's body has been read, so no other message comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
