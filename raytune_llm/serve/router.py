"""Ray Serve's choice of a replica for a request, by the adapters that replicas hold. One of the few files that import ray.

Every ingress has a router of its own. Replicas tell what they hold once a second (`record_routing_stats`, spread by Serve's
controller); in between, a router counts on what it sent itself.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from raytune_llm.serve.placement import Place, ordered

STATS_S = 1.0
"""Replicas are asked for what they hold so often."""
SENT_S = 3 * STATS_S
"""An adapter that a request was sent for is taken as resident for so long, until its replica says so itself."""

GOING_S = 0.25
"""A request is at its replica after this."""


class AdapterRouter(RequestRouter):
    def initialize_state(self, **kwargs: Any) -> None:
        self._sent: dict[tuple[ReplicaID, str], float] = {}
        """Adapters that requests were sent for, and when."""
        self._going: dict[str, tuple[ReplicaID, float]] = {}
        """Requests that are on their way to a replica, which Serve's count of its requests doesn't have yet."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        now = time.monotonic()
        self._sent = {key: at for key, at in self._sent.items() if now - at < SENT_S}
        self._going = {key: going for key, going in self._going.items() if now - going[1] < GOING_S}
        # Of replicas that are as good, another one each time.
        replicas = {one.replica_id: one for one in random.sample(candidate_replicas, len(candidate_replicas))}
        adapter = pending_request.metadata.multiplexed_model_id or None if pending_request is not None else None
        order = ordered(adapter, {key: self._place(one) for key, one in replicas.items()})
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, after the last of them
            self._going[pending_request.metadata.internal_request_id] = order[0], now
        return [[replicas[key]] for key in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._going.pop(pending_request.metadata.internal_request_id, None)
        if adapter := pending_request.metadata.multiplexed_model_id:
            self._sent[replica_id, adapter] = time.monotonic()

    def _place(self, replica: RunningReplica) -> Place:
        told, name = replica.routing_stats, replica.replica_id
        sent = {adapter for replica_id, adapter in self._sent if replica_id == name}
        going = sum(replica_id == name for replica_id, _ in self._going.values())
        return Place(
            rows=told.get("rows", replica.max_ongoing_requests),
            requests=going + (self.replica_queue_len_cache.get(name) or 0),
            resident=sent.union(told.get("resident", ())),
            slots=told.get("slots", 1),
            held=sent.union(told["held"]) if "held" in told else None,
        )
