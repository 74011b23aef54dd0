"""Ray's TorchTrainer, with its controller in a thread of the driver. Imports ray and torch. [ray]

Ray starts the controller as an actor, and that starts more actors: one frees the workers' placement group if the controller dies,
one passes requests to an autoscaler, and one distributes data sets. Each takes seconds to import Ray Train before the workers can
start. Runs don't need them here: the placement group ends with the driver, an autoscaler sees the pending placement group, and
workers read token stores.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._private.state import actors
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import placement_group_table, remove_placement_group

from raytune_llm.runs.faults import MAX_NAMED

NOT_NEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)


class GroupTrainer(TorchTrainer):
    def __init__(self, *arguments: Any, again: Callable[[Exception], bool], starts_within_s: float, **settings: Any) -> None:
        """again: called in a thread of this process with each error of Ray Train; it returns whether to start the group again.
        starts_within_s: how long workers that have their resources may take to start, for which Ray would wait without limit."""
        super().__init__(*arguments, **settings)
        self._again = again
        self._groups = Groups(starts_within_s)

    def end(self) -> None:
        """End the workers from another thread, even while they start. `fit` then raises."""
        self._groups.end()

    def nodes(self) -> set[str]:
        """Ids of the workers' nodes; empty while they start."""
        return self._groups.nodes()

    def waits(self) -> bool:
        """Whether the workers still wait for their placement group."""
        return self._groups.waits()

    def _asked(self, error: Exception) -> bool:
        return not self._groups.ended() and self._again(error)

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, NOT_NEEDED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policies = {"scaling_policy": Unannounced(self.scaling_config), "failure_policy": Asked(self._asked)}
        controller: Any = TrainController(**{**settings, **policies})
        controller.worker_group_cls = self._groups
        asyncio.run(controller.run())
        return controller.get_result()


class Unannounced(FixedScalingPolicy):
    """A group of fixed size that sends no resource requests: an autoscaler sees its placement group."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class Asked(FailurePolicy):
    """Lets `again` decide on restarts. Ray's own policy counts the failures of the whole run, not those of the last hour."""

    def __init__(self, again: Callable[[Exception], bool]) -> None:
        self._again = again

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        return FailureDecision.RETRY if self._again(training_failed_error) else FailureDecision.RAISE


class Groups:
    """The groups of workers that a controller starts, one after another, until they are ended."""

    def __init__(self, starts_within_s: float) -> None:
        self._starts_within_s = starts_within_s
        self._lock = threading.Lock()
        self._group: Group | None = None
        self._place: Any = None
        self._waits = self._ended = False
        self._start: threading.Timer | None = None
        """Ends a start that takes too long."""
        self._late: StartedTooLate | None = None

    def create(self, **settings: Any) -> WorkerGroup:
        """Called by the controller."""
        if self._ended:
            raise RuntimeError("the group was ended")
        self._group, self._late = Group(self, **settings), None
        try:
            self._group._start()
        except Exception:
            if self._late is not None:
                raise self._late from None
            raise
        finally:
            if self._start is not None:
                self._start.cancel()
        return self._group

    def nodes(self) -> set[str]:
        state = None if self._group is None else self._group._worker_group_state
        return set() if state is None else {worker.metadata.node_id for worker in state.workers}

    def waits(self) -> bool:
        return self._waits

    def took(self, place: Any) -> None:
        """Called with the placement group of a group that starts."""
        with self._lock:
            self._place, self._waits = place, True
            ended = self._ended
        if ended:
            remove_placement_group(place)

    def placed(self) -> None:
        """Called when the placement group has its resources."""
        self._waits = False
        self._start = threading.Timer(self._starts_within_s, self._end_start)
        self._start.daemon = True
        self._start.start()

    def _end_start(self) -> None:
        try:
            self._late = StartedTooLate(self._place, self._starts_within_s)
        finally:  # also where the cluster can't say which nodes these are
            remove_placement_group(self._place)

    def ended(self) -> bool:
        return self._ended

    def end(self) -> None:
        """End the workers by removing their placement group."""
        with self._lock:
            self._ended = True
            place = self._place
        if place is not None:  # in a thread, since the call waits for a head that may be gone
            threading.Thread(target=remove_placement_group, args=(place,), daemon=True).start()


class StartedTooLate(Exception):
    """A process of the group stands still, or its machine does."""

    def __init__(self, place: Any, limit_s: float) -> None:
        nodes = nodes_without_workers(place)
        named = ", ".join(nodes[:MAX_NAMED]) + (f" and {len(nodes) - MAX_NAMED} more nodes" if len(nodes) > MAX_NAMED else "")
        super().__init__(f"those on {named} have not all answered within {limit_s:g} s: a process or a machine stands still")


def nodes_without_workers(place: Any) -> list[str]:
    """Addresses of a placement group's nodes where a worker has not started; where all have, of all its nodes."""
    ids = set(placement_group_table(place)["bundles_to_node_id"].values())
    starting = {actor["Address"]["NodeID"] for actor in actors(actor_state_name="PENDING_CREATION").values()}
    return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in (ids & starting or ids))


class Group(WorkerGroup):
    def __init__(self, groups: Groups, **settings: Any) -> None:
        super().__init__(**settings)
        self._groups = groups

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        handle = super()._create_placement_group(scaling_config, worker_group_context)
        self._groups.took(handle.placement_group)
        return handle

    def _create_workers(self, *arguments: Any, **settings: Any) -> Any:
        self._groups.placed()
        return super()._create_workers(*arguments, **settings)

    def shutdown(self) -> None:
        """Kill a failed group at once. Ray would wait for its workers, even for one that does not answer."""
        status = self.get_latest_poll_status()
        if status is not None and status.errors and self.has_started():
            for worker in self.get_workers():
                ray.kill(worker.actor)
        super().shutdown()

    def _init_train_context_on_workers(self, workers: Sequence[Any], sync_actor: Any, train_context_args: Any) -> None:
        """Ray's method without its controller actor, which workers could ask for checkpoints."""
        starts = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(starts)
        self._decorate_worker_log_file_paths(list(workers))

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """The job's own runtime environment without extra variables, so that idle processes of a node can be used."""
        return custom_runtime_env
