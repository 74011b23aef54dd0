"""A replica of the engine deployment: one engine behind Ray Serve's calls. One of the few files that import ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError

from raytune_llm.config.run import ServeRun
from raytune_llm.engines.engine import AdapterState, Engine
from raytune_llm.engines.requests import Delta, Request, TokenLogprob
from raytune_llm.errors import DataError, ResourceError, UserError
from raytune_llm.serve.backend import EngineReport, InProcessBackend, ModelFacts, Overloaded, Pooling, failure_of, warm_up
from raytune_llm.serve.ledger import AdapterChange, Changes
from raytune_llm.serve.logs import log_at
from raytune_llm.serve.watch import Watcher

log = logging.getLogger("raytune_llm.serve")
PEER_INTERVAL_S = 5.0
"""Interval at which a replica asks the others for their ledgers."""
REFUSED = "refused:"
"""Prefix of the message of a replica that failed to start with a UserError, by which it is found in Serve's status."""

BuildEngine = Callable[[ServeRun], tuple[Engine, ModelFacts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A UserError as a value. Ray wraps exceptions that a remote call raises, which would lose the class."""

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
    """An engine's error in another process, with its text unchanged."""

    def __init__(self, text: str) -> None:
        UserError.__init__(self, text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class EngineReplica:
    async def __init__(self, run: ServeRun, build: BuildEngine) -> None:
        """Ray Serve routes requests to the replica once this returns, after a first warm-up request."""
        log_at(run.serve.log_level)
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._changes = Changes(self._apply)
        self._broken: UserError | None = None
        self._watcher: Watcher | None = None
        self._engine, self._facts = await asyncio.to_thread(_built, run, build)
        self._backend = InProcessBackend(self._engine, self._facts, max_waiting=run.serve.max_waiting, name=self._name)
        self._rows, self._slots = run.engine.max_rows, run.serve.max_adapters
        if run.serve.watch is not None:
            folder = Path(run.serve.watch).resolve()
            self._watcher = Watcher(folder, self._engine, base_name=self._facts.name, adapters=run.serve.adapters)
            await asyncio.to_thread(self._watcher.start)
        self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        await self._ask_peers()
        self._asking = asyncio.create_task(self._keep_asking_peers())
        if not self._facts.scores:
            await asyncio.to_thread(warm_up, self._engine)

    # Called by an ingress -------------------------------------------------------------------------------------------------

    async def facts(self) -> ModelFacts:
        return self._facts

    async def stream(self, request: Request) -> AsyncIterator[list[Delta] | Failure]:
        """Deltas of the answer as they are generated, or a Failure as the last item."""
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

    async def prompt_logprobs(self, prompt: Sequence[int], adapter: str | None, top: int) -> list[TokenLogprob] | Failure:
        try:
            if adapter is not None:
                await self._look_for(adapter)
            return await self._backend.prompt_logprobs(prompt, adapter, top)
        except UserError as error:
            return self._failed(error)

    # Broadcast by an ingress -------------------------------------------------------------------------------------

    async def report(self) -> EngineReport:
        (report,) = await self._backend.reports()
        return report

    async def ledger(self) -> list[AdapterChange]:
        return self._changes.all()

    async def change(self, change: AdapterChange) -> str | Failure | None:
        """Apply a change. Returns the version if an adapter was loaded, and a Failure for whatever goes wrong: an exception would
        look like that of a replica which is gone."""
        try:
            return await self._changes.make(change)
        except UserError as error:
            return self._failed(error)
        except Exception as error:
            log.exception("a change of %s failed", change.name)
            return Failure(kind="broken", text=f"a replica failed to change {change.name} ({type(error).__name__}: {error})")

    # Called by Ray Serve --------------------------------------------------------------------------------------------------

    def record_routing_stats(self) -> dict[str, Any]:
        states = self._engine.adapters()
        return {
            "rows": self._rows,
            "slots": self._slots,
            "resident": [one.name for one in states if one.residency == "device"],
            "held": [one.name for one in states],
        }

    def check_health(self) -> None:
        if failure := self._broken or failure_of(self._engine.stats()):
            raise RuntimeError(f"the engine has failed: {failure}")

    def __del__(self) -> None:
        """Called by Ray Serve after the replica's requests have ended."""
        if self._watcher is not None:
            self._watcher.stop()
        self._engine.close()

    # Internal --------------------------------------------------------------------------------------------------------------

    def _failed(self, error: UserError) -> Failure:
        failure = Failure.of(error)
        if failure.kind == "broken":
            self._broken = error  # a failed engine does not recover: the next health check makes Ray Serve replace the replica
        return failure

    async def _look_for(self, adapter: str) -> None:
        """Load an adapter that other replicas have and this one doesn't yet: from the watched folder or a peer's ledger."""
        if await self._backend.serves(adapter):
            return
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.scan)
        if not await self._backend.serves(adapter):
            await self._ask_peers()

    async def _keep_asking_peers(self) -> None:
        while True:
            await asyncio.sleep(PEER_INTERVAL_S)
            await self._ask_peers()

    async def _ask_peers(self) -> None:
        """Apply changes that were broadcast before this replica could receive them."""
        try:
            ledgers = await asyncio.wait_for(
                self._peers.broadcast("ledger").results_async(return_exceptions=True), PEER_INTERVAL_S
            )
        except (TimeoutError, DeploymentUnavailableError):  # this is the first replica
            return
        known = [change for ledger in ledgers if isinstance(ledger, list) for change in ledger]
        await self._changes.catch_up(known, self._refused, self._watched)

    def _watched(self, name: str) -> str | None:
        """The version in which serve.watch serves a name here. None: it doesn't, or a change has replaced it."""
        version = None if self._watcher is None else self._watcher.version_of(name)
        return version if any((one.name, one.version) == (name, version) for one in self._engine.adapters()) else None

    def _refused(self, change: AdapterChange, error: UserError) -> None:
        log.warning("%s is not served by %s: %s", change.name, self._name, error)

    async def _apply(self, change: AdapterChange) -> str | None:
        states = {one.name: one for one in self._engine.adapters()}
        if change.what == "pinned":
            if change.name in states:
                await self._backend.pin(change.name, change.pinned)
        elif change.folder is not None:
            version = await self._backend.add_adapter(change.name, change.folder, pinned=change.pinned)
            if not change.pinned:
                await self._backend.pin(change.name, False)  # where a pin is undone with the change that made it
            return version
        elif change.name in states:
            await self._backend.remove_adapter(change.name)
        return None


def merge_adapters(reports: Sequence[EngineReport]) -> list[AdapterState]:
    """Adapters of all replicas: each with its fastest residency on any replica and its requests summed over replicas."""
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
