"""Ray Serve's request router: chooses a replica by the adapters it has loaded. One of the few files that import ray.

Every ingress has its own router. Replicas report their adapters once a second (`record_routing_stats`, distributed by Serve's
controller); between reports, a router relies on the requests that it has sent itself.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from raytune_llm.serve.placement import ReplicaLoad, rank_replicas

STATS_INTERVAL_S = 1.0
"""Interval at which Serve collects the replicas' adapters."""
ASSUMED_RESIDENT_S = 3 * STATS_INTERVAL_S
"""After a request for an adapter, its replica is assumed to have the adapter on the device for this long."""
IN_FLIGHT_S = 0.25
"""After this time a request is counted by its replica."""


class AdapterRouter(RequestRouter):
    def initialize_state(self, **kwargs: Any) -> None:
        self._sent: dict[tuple[ReplicaID, str], float] = {}
        """(replica, adapter) -> time of the last request sent."""
        self._in_flight: dict[str, tuple[ReplicaID, float]] = {}
        """Request id -> (replica, time) of requests that were sent and that Serve doesn't count for the replica yet."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        now = time.monotonic()
        self._sent = {key: at for key, at in self._sent.items() if now - at < ASSUMED_RESIDENT_S}
        self._in_flight = {key: going for key, going in self._in_flight.items() if now - going[1] < IN_FLIGHT_S}
        # A random order, so that ties go to a different replica each time.
        replicas = {one.replica_id: one for one in random.sample(candidate_replicas, len(candidate_replicas))}
        adapter = pending_request.metadata.multiplexed_model_id or None if pending_request is not None else None
        order = rank_replicas(adapter, {key: self._load(one) for key, one in replicas.items()})
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait before trying again if all replicas are full
            self._in_flight[pending_request.metadata.internal_request_id] = order[0], now
        return [[replicas[key]] for key in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._in_flight.pop(pending_request.metadata.internal_request_id, None)
        if adapter := pending_request.metadata.multiplexed_model_id:
            self._sent[replica_id, adapter] = time.monotonic()

    def _load(self, replica: RunningReplica) -> ReplicaLoad:
        stats, name = replica.routing_stats, replica.replica_id
        sent = {adapter for replica_id, adapter in self._sent if replica_id == name}
        going = sum(replica_id == name for replica_id, _ in self._in_flight.values())
        return ReplicaLoad(
            rows=stats.get("rows", replica.max_ongoing_requests),
            requests=going + (self.replica_queue_len_cache.get(name) or 0),
            resident=sent.union(stats.get("resident", ())),
            slots=stats.get("slots", 1),
            held=sent.union(stats["held"]) if "held" in stats else None,
        )
