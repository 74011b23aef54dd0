"""Decides how many workers an elastic run has (resources.num_workers=[fewest,most]).

If there is room for a larger group, the driver asks the current one to save and end, and a larger one resumes, so no step is
lost. The same happens if a node of the group drains: a group that fits on the other nodes resumes. After the loss of a worker, a
group of the size that fits is started: a smaller one at once if the worker's node is gone, the same size if the node has room for
it again. The size does not change what is computed: global batch, order of samples and schedule don't depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raytune_llm.report.updates import Notice
from raytune_llm.runs.group_size import missing_room
from raytune_llm.runs.live_nodes import LOOK_EVERY_S, LiveNode, nodes_there
from raytune_llm.runs.nodes import workers_that_fit
from raytune_llm.runs.outcome import TrainOutcome

POLL_S = 0.5
SETTLED_S = 4.0
"""There must be room for a larger group for this long before it starts, because nodes join one after another."""
RELEASED_WITHIN_S = 20.0
"""Longest wait for the resources of an ended group. After that, another job must have taken them."""


def largest(counts: Sequence[int], nodes: Sequence[LiveNode], each: Mapping[str, float], *, held: int = 0) -> int | None:
    """The largest of these numbers of workers that fits now; None if none fits. held: the number of running workers, whose room
    counts as free."""
    room = held + sum(workers_that_fit(node.free, each) for node in nodes)
    return max((count for count in counts if count <= room), default=None)


def largest_ever(counts: Sequence[int], nodes: Sequence[LiveNode], each: Mapping[str, float]) -> int | None:
    """`largest` on an idle cluster."""
    return largest(counts, [LiveNode(total=node.total, free=node.total) for node in nodes], each)


def wait_for_room(
    counts: Sequence[int], each: Mapping[str, float], notify: Callable[[Notice], None], *, wanted: int | None = None
) -> int:
    """The number of workers of the next group. Waits without limit for the smallest one.

    wanted: a size to wait for up to RELEASED_WITHIN_S, if the nodes are large enough but an ending group still holds resources.
    """
    began, noticed = time.monotonic(), ""
    while True:
        nodes = nodes_there()
        found, possible = largest(counts, nodes, each), largest_ever(counts, nodes, each)
        waited = time.monotonic() - began
        aim = min(wanted, possible) if wanted is not None and possible is not None else counts[0]
        if found is not None and (found >= aim or waited > RELEASED_WITHIN_S):
            return found
        line = missing_room(counts[0], each, nodes)
        if line is not None and line != noticed and waited > LOOK_EVERY_S:
            notify(Notice(text=line))
            noticed = line
        time.sleep(POLL_S)


@dataclass(kw_only=True)
class RoomToGrow:
    """Looks for room for a larger group during training. It must be called often."""

    counts: Sequence[int]
    workers: int
    each: Mapping[str, float]
    look: Callable[[], Sequence[LiveNode]] = nodes_there
    clock: Callable[[], float] = time.monotonic
    found: int | None = field(default=None, init=False)
    """The larger count that there was room for at the last look."""
    _looked: float = field(default=float("-inf"), init=False)
    _since: float | None = field(default=None, init=False)

    def __call__(self) -> bool:
        """Whether there has been room for SETTLED_S."""
        now = self.clock()
        if self.workers >= self.counts[-1] or now - self._looked < LOOK_EVERY_S:
            return False
        self._looked = now
        self.found = largest(self.counts, self.look(), self.each, held=self.workers)
        if self.found is None or self.found <= self.workers:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        return now - self._since >= SETTLED_S


def of_all(outcomes: Sequence[TrainOutcome]) -> TrainOutcome:
    """The joint result of groups that resumed one another, in order."""
    last = outcomes[-1]
    times = {name: sum(getattr(one, name) for one in outcomes) for name in ("load_s", "train_s", "save_s")}
    return replace(last, **times)
