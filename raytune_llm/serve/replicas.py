"""The backend over the replicas of the engine deployment. One of the few files that import ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raytune_llm.engines.engine import AdapterState
from raytune_llm.engines.requests import Delta, Request, TokenLogprob
from raytune_llm.errors import ResourceError
from raytune_llm.serve.backend import EngineReport, ModelFacts, Pooling
from raytune_llm.serve.ledger import AdapterChange, now_after
from raytune_llm.serve.replica import Failure, merge_adapters

log = logging.getLogger("raytune_llm.serve")
REPORT_MAX_AGE_S = 1.0
"""Maximum age of cached reports."""
REPORT_S = 5.0
"""Replicas have so long to say what they hold."""
BROADCAST_TIMEOUT_S = 120.0
"""Timeout of a broadcast, in which replicas may load an adapter."""
MAX_ATTEMPTS = 3
"""A request whose replica failed before the first delta is sent to another replica, this often in all."""


class ReplicaBackend:
    def __init__(self, engines: DeploymentHandle, facts: ModelFacts, adapters: Mapping[str, str]) -> None:
        """adapters: name -> folder of the adapters that replicas load at their start."""
        self._engines, self.facts, self._adapters = engines, facts, adapters
        self._streams = engines.options(method_name="stream", stream=True)
        self._reports: list[EngineReport] = []
        self._names: frozenset[str] = frozenset()
        self._reported_at = -REPORT_MAX_AGE_S
        self._asking = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        handle = self._streams
        if request.adapter is not None:
            handle = handle.options(multiplexed_model_id=request.adapter)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            begun = False
            response: Any = handle.remote(request)
            try:
                async for item in response:
                    if isinstance(item, Failure):
                        raise item.error()
                    begun = True
                    for delta in item:
                        yield delta
                        if delta.completion is not None:
                            return
                raise ResourceError("a replica stopped in the middle of the answer", "Send the request again")
            except TaskCancelledError:  # the client is gone
                raise
            except (RayError, RayServeException) as error:
                if begun or attempt == MAX_ATTEMPTS:
                    raise _lost(error) from None
            finally:
                response.cancel()  # does nothing to a response that has ended

    async def pooled(self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None) -> list[list[float]]:
        return await self._asked("pooled", adapter, prompts, pooling, adapter)

    async def prompt_logprobs(self, prompt: Sequence[int], adapter: str | None, top: int) -> list[TokenLogprob]:
        return await self._asked("prompt_logprobs", adapter, prompt, adapter, top)

    async def _asked(self, method: str, adapter: str | None, *arguments: Any) -> Any:
        """The result of a replica's method, of one that has the adapter if any does."""
        handle = self._engines.options(method_name=method, multiplexed_model_id=adapter or "")
        try:
            values = await handle.remote(*arguments)
        except (RayError, RayServeException) as error:
            raise _lost(error) from None
        if isinstance(values, Failure):
            raise values.error()
        return values

    async def serves(self, adapter: str) -> bool:
        """Answers from the last reports, which are renewed in the background. Only a request for an adapter that no replica
        reported waits for new ones."""
        if adapter not in self._names:
            await self.reports()
        elif self._stale and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew())
        return adapter in self._names

    async def reports(self) -> Sequence[EngineReport]:
        async with self._asking:  # concurrent callers share one broadcast
            if self._stale:
                await self._ask_again()
        return self._reports

    async def adapters(self) -> Sequence[AdapterState]:
        return merge_adapters(await self.reports())

    async def add_adapter(self, name: str, folder: str, *, pinned: bool) -> str:
        at, before = await self._time_and_folder(name)
        was = await self._state_of(name)
        was_pinned, replaced = (False, None) if was is None else (was.pinned, was.version)
        change = AdapterChange(at=at, name=name, what="folder", folder=folder, pinned=pinned or was_pinned, replaced=replaced)
        versions = await self._make(change, undo=replace(change, at=at + 1, folder=before, pinned=was_pinned))
        return str(versions[0])

    async def remove_adapter(self, name: str) -> None:
        at, _ = await self._time_and_folder(name)
        was = await self._state_of(name)
        await self._make(AdapterChange(at=at, name=name, what="folder", replaced=None if was is None else was.version))

    async def pin(self, name: str, pinned: bool) -> None:
        at, _ = await self._time_and_folder(name)
        was = await self._state_of(name)
        change = AdapterChange(at=at, name=name, what="pinned", pinned=pinned)
        await self._make(change, undo=replace(change, at=at + 1, pinned=was is not None and was.pinned))

    @property
    def _stale(self) -> bool:
        return time.monotonic() - self._reported_at > REPORT_MAX_AGE_S

    async def _renew(self) -> None:
        try:
            await self.reports()
        except ResourceError as error:
            log.warning("the engines did not say what they hold: %s", error)

    async def _ask_again(self) -> None:
        self._reports = await self._broadcast("report", limit_s=REPORT_S)
        self._names = frozenset(state.name for report in self._reports for state in report.adapters)
        self._reported_at = time.monotonic()

    async def _time_and_folder(self, name: str) -> tuple[int, str | None]:
        """A time later than all changes of this adapter, and its current folder (None: it has none)."""
        ledgers = await self._broadcast("ledger", limit_s=REPORT_S)
        changes = [one for ledger in ledgers for one in ledger if one.name == name]
        folders = [one for one in changes if one.what == "folder"]
        return now_after(changes), max(folders, key=lambda one: one.at).folder if folders else self._adapters.get(name)

    async def _state_of(self, name: str) -> AdapterState | None:
        """The adapter's state in new reports; None if no replica has it."""
        async with self._asking:
            await self._ask_again()
        return next((state for state in merge_adapters(self._reports) if state.name == name), None)

    async def _make(self, change: AdapterChange, *, undo: AdapterChange | None = None) -> list[Any]:
        """Make a change on all replicas and return their results. If one refuses it, raise its error and broadcast `undo`, which
        restores the state of the others."""
        outcomes = await self._tell(change)
        failures = [one for one in outcomes if isinstance(one, Failure)]
        if failures and len(failures) < len(outcomes) and undo is not None:
            await self._tell(undo)
        if failures:
            raise failures[0].error()
        return outcomes

    async def _tell(self, change: AdapterChange) -> list[Any]:
        """Broadcast a change. Returns each replica's result."""
        outcomes = await self._broadcast("change", change, limit_s=BROADCAST_TIMEOUT_S)
        async with self._asking:
            await self._ask_again()
        return outcomes

    async def _broadcast(self, method: str, *arguments: Any, limit_s: float) -> list[Any]:
        """The results of a call of all replicas, without those that failed. Raises ResourceError if none answered."""
        try:
            response = self._engines.broadcast(method, *arguments)
            results = await asyncio.wait_for(response.results_async(return_exceptions=True), limit_s)
        except (RayError, RayServeException, TimeoutError) as error:
            raise _lost(error) from None
        if answered := [one for one in results if not isinstance(one, BaseException)]:
            return answered
        raise ResourceError("no engine answers", "Send the request again")


def _lost(error: Exception) -> ResourceError:
    return ResourceError(f"the engine failed during the request ({type(error).__name__})", "Send the request again")
