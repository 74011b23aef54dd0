"""A replica of the engine deployment: one engine, asked through Ray Serve. One of the few files that import ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

from raytune_llm.config.run import ServeRun
from raytune_llm.engines.engine import AdapterState, Engine
from raytune_llm.engines.requests import Delta, Request, Sampling
from raytune_llm.errors import DataError, ResourceError, UserError
from raytune_llm.serve.backend import InProcess, ModelFacts, Overloaded, Pooling, Report
from raytune_llm.serve.ledger import Change, Changes
from raytune_llm.serve.logs import log_at
from raytune_llm.serve.watch import Watcher

log = logging.getLogger("raytune_llm.serve")
STALLED_S = 120.0
"""An engine whose loop gave no sign of life for so long is replaced: more than the longest step, compilation included."""
PEERS_S = 5.0
"""A replica asks the others for their ledgers so often."""
REFUSED = "refused:"
"""Begins what a replica says that could not start, in Serve's status."""

BuildEngine = Callable[[ServeRun], tuple[Engine, ModelFacts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error as a value: errors that cross Ray come out as other classes than they went in."""

    kind: Literal["invalid", "overloaded", "broken"]
    text: str

    @classmethod
    def of(cls, error: UserError) -> Failure:
        kind = "overloaded" if isinstance(error, Overloaded) else "broken" if isinstance(error, ResourceError) else "invalid"
        return cls(kind=kind, text=str(error).rstrip("."))

    def error(self) -> UserError:
        match self.kind:
            case "overloaded":
                return Overloaded()
            case "broken":
                return ResourceError(self.text)
            case "invalid":
                return Refused(self.text)


class Refused(DataError):
    """What an engine said elsewhere, in its words."""

    def __init__(self, text: str) -> None:
        UserError.__init__(self, text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class EngineReplica:
    async def __init__(self, run: ServeRun, build: BuildEngine) -> None:
        """It is ready when it answered once."""
        log_at(run.serve.log_level)
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._changes = Changes(self._apply)
        self._broken: UserError | None = None
        self._watcher: Watcher | None = None
        self._engine, self._facts = await asyncio.to_thread(_built, run, build)
        self._backend = InProcess(self._engine, self._facts, max_waiting=run.serve.max_waiting, name=self._name)
        self._rows, self._slots = run.engine.max_rows, run.serve.max_adapters
        if run.serve.watch is not None:
            folder = Path(run.serve.watch).resolve()
            self._watcher = Watcher(folder, self._engine, base_name=self._facts.name, told=log.info)
            await asyncio.to_thread(self._watcher.start)
        self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        await self._ask_peers()
        self._asking = asyncio.create_task(self._keep_asking_peers())
        if not self._facts.scores:
            await asyncio.to_thread(_answer_once, self._engine)

    # What an ingress asks -------------------------------------------------------------------------------------------------

    async def facts(self) -> ModelFacts:
        return self._facts

    async def stream(self, request: Request) -> AsyncIterator[list[Delta] | Failure]:
        """What comes of the answer, as it comes."""
        try:
            if request.adapter is not None:
                await self._look_for(request.adapter)
            async for deltas in self._backend.batches(request):
                yield deltas
        except UserError as error:
            yield self._failed(error)

    async def pooled(
        self, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None
    ) -> list[list[float]] | Failure:
        try:
            if adapter is not None:
                await self._look_for(adapter)
            return await self._backend.pooled(prompts, pooling, adapter)
        except UserError as error:
            return self._failed(error)

    # What an ingress tells all replicas -------------------------------------------------------------------------------------

    async def report(self) -> Report:
        (report,) = await self._backend.reports()
        return report

    async def ledger(self) -> list[Change]:
        return self._changes.all()

    async def change(self, change: Change) -> str | Failure | None:
        """Gives the version of an adapter that was loaded."""
        try:
            return await self._changes.make(change)
        except UserError as error:
            return self._failed(error)

    # What Ray Serve asks --------------------------------------------------------------------------------------------------

    def record_routing_stats(self) -> dict[str, Any]:
        states = self._engine.adapters()
        return {
            "rows": self._rows,
            "slots": self._slots,
            "resident": [one.name for one in states if one.residency == "device"],
            "held": [one.name for one in states],
        }

    def check_health(self) -> None:
        silent_s = time.monotonic() - self._engine.stats().last_step_at
        if self._broken is not None or silent_s > STALLED_S:
            raise RuntimeError(f"the engine is gone: {self._broken or f'no heartbeat for {silent_s:.0f} s'}")

    def __del__(self) -> None:
        """After its requests ended."""
        if self._watcher is not None:
            self._watcher.stop()
        self._engine.close()

    # Its own ----------------------------------------------------------------------------------------------------------------

    def _failed(self, error: UserError) -> Failure:
        failure = Failure.of(error)
        if failure.kind == "broken":
            self._broken = error  # an engine that failed stays so: the next health check has it replaced
        return failure

    async def _look_for(self, adapter: str) -> None:
        """An adapter that another replica was told of, or saw in the watched folder, may not be here yet."""
        if await self._backend.serves(adapter):
            return
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.look)
        if not await self._backend.serves(adapter):
            await self._ask_peers()

    async def _keep_asking_peers(self) -> None:
        while True:
            await asyncio.sleep(PEERS_S)
            await self._ask_peers()

    async def _ask_peers(self) -> None:
        """For changes that were made before this replica could be told."""
        try:
            told = await asyncio.wait_for(self._peers.broadcast("ledger").results_async(return_exceptions=True), PEERS_S)
        except (TimeoutError, DeploymentUnavailableError):  # it is the first one
            return
        known = [change for ledger in told if isinstance(ledger, list) for change in ledger]
        await self._changes.catch_up(known, self._refused)

    def _refused(self, change: Change, error: UserError) -> None:
        log.warning("%s is not served by %s: %s", change.name, self._name, error)

    async def _apply(self, change: Change) -> str | None:
        states = {one.name: one for one in self._engine.adapters()}
        if change.what == "pinned":
            if change.name in states:
                await self._backend.pin(change.name, change.pinned)
        elif change.folder is not None:
            return await self._backend.add_adapter(change.name, change.folder, pinned=change.pinned)
        elif change.name in states:
            await self._backend.remove_adapter(change.name)
        return None


def merged(reports: Sequence[Report]) -> list[AdapterState]:
    """Adapters of all replicas: where the nearest of each is, and how many requests it has in all."""
    nearness = ("device", "host", "disk")
    found: dict[str, AdapterState] = {}
    for state in (state for report in reports for state in report.adapters):
        other = found.get(state.name)
        if other is None:
            found[state.name] = state
            continue
        near = min(other, state, key=lambda one: nearness.index(one.residency))
        found[state.name] = AdapterState(
            name=state.name,
            version=other.version,
            rank=other.rank,
            residency=near.residency,
            pinned=other.pinned or state.pinned,
            in_use=other.in_use + state.in_use,
        )
    return list(found.values())


def _built(run: ServeRun, build: BuildEngine) -> tuple[Engine, ModelFacts]:
    try:
        return build(run)
    except UserError as error:
        raise RuntimeError(f"{REFUSED} {error}") from None


def _answer_once(engine: Engine) -> None:
    """What is compiled or read at first use is, before anybody waits for it."""
    engine.submit(Request(prompt_ids=[0], sampling=Sampling(max_new_tokens=2, ignore_end=True))).result()
