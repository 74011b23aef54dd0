"""Trials that share a base (tune.share_base): as many at a time as a bank of adapters holds, in one pass a step.

All trials of a bank come to a rung at the same step, and are judged there in the order of their numbers: ASHA and HyperBand
compare a trial with those before it at that rung, as where trials run one after another, and decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from raytune_llm.byte_size import in_units
from raytune_llm.config.resources import INLINE, on_cluster, uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.config.sharing import obstacle
from raytune_llm.config.sweep import Sweep
from raytune_llm.data.kinds import KINDS
from raytune_llm.errors import ConfigError
from raytune_llm.runs.together import Part, Room
from raytune_llm.tune.conduct import Conduct
from raytune_llm.tune.metric import Metric, MetricMissing
from raytune_llm.tune.trial import FAILURES, Listener, Outcome, Reported, Stopped, Trial, failed, free, outcome_of

TrainTogether = Callable[..., Sequence[Any]]
"""api.train_together."""
PAYS_BELOW = 2048
"""Tokens of a trial's pass on a GPU: with more, several trials in one pass are hardly faster (`scripts/bench shared_base`). On
a CPU one pass is never faster by itself."""


def trials_together(sweep: Sweep, room_for: Callable[[TrainRun], Room], *, gpus: int) -> tuple[int, str]:
    """How many trials are computed in one pass, and why; 1 if each has a pass of its own. room_for: the room on this process's
    device. gpus: the number of this machine's GPUs.

    Raises ConfigError if tune.share_base=true and not even two trials fit in a pass.
    """
    if sweep.tune.share_base is True:
        return _as_asked(sweep, room_for(_largest(sweep)))
    if sweep.tune.share_base is False or not gpus or sweep.unshared is not None or _changes_the_search(sweep):
        return 1, ""
    if not uses_ray(sweep.base.resources):
        return _where_faster(sweep, room_for)
    return _where_crowded(sweep, room_for, gpus)


def _as_asked(sweep: Sweep, room: Room) -> tuple[int, str]:
    if room.together > 1:
        return min(room.together, _most(sweep)), "asked for"
    two = f"two trials need {in_units(room.pair_bytes)} of the usable {in_units(room.usable_bytes)}"
    raise ConfigError(
        "tune.share_base",
        f"can't be true where not even two trials fit in one pass: by estimate {two}",
        got=True,
        fix="Lower train.micro_batch_size or data.max_length, quantize the base, or set tune.share_base=false.",
    )


def _where_faster(sweep: Sweep, room_for: Callable[[TrainRun], Room]) -> tuple[int, str]:
    """The number of trials to train together instead of one after another, and why."""
    run = sweep.base
    tokens = run.train.micro_batch_size * run.data.max_length * KINDS[run.stage.kind].sides
    if tokens >= PAYS_BELOW:
        return 1, ""
    together = room_for(_largest(sweep)).together
    return min(together, _most(sweep)), f"passes of {tokens:,} tokens leave the GPU idle"


def _where_crowded(sweep: Sweep, room_for: Callable[[TrainRun], Room], gpus: int) -> tuple[int, str]:
    """The number of trials to train together, and why, if the processes that tune.max_concurrent asks for don't fit the only
    GPU."""
    run, asked = sweep.base, sweep.tune.max_concurrent
    if on_cluster(run.resources) or run.resources.num_workers not in ("auto", 1) or not run.fits_one_process:
        return 1, ""
    if gpus > 1 or asked is None or asked < 2:
        return 1, ""
    room = room_for(_largest(sweep))
    wanted = _most(sweep)
    if room.usable_bytes // room.alone_bytes >= wanted or room.together < wanted:
        return 1, ""
    each = f"{wanted} processes of {in_units(room.alone_bytes)}"
    return wanted, f"{each} don't fit the GPU's usable {in_units(room.usable_bytes)}"


def _most(sweep: Sweep) -> int:
    """The largest number of trials to train together, if they fit."""
    tune = sweep.tune
    trials = (tune.trials or len(sweep.planned)) * tune.seeds
    return min(tune.max_concurrent or trials, trials)


def _changes_the_search(sweep: Sweep) -> bool:
    """Whether the sweep would end differently: its trials depend on results of earlier ones, or its seeds need different
    packs."""
    return sweep.tune.learns or sweep.tune.rounds or sweep.tune.compares_running or sweep.tune.seeds > 1


def _largest(sweep: Sweep) -> TrainRun:
    """The planned run with the highest rank, for which every slot of a bank needs room."""
    runs = [sweep.base, *(sweep.composed(point) for point in sweep.planned)]
    return max(runs, key=lambda run: getattr(run.adapter, "rank", 0))


def run_banks(conduct: Conduct, *, size: int, train_together: TrainTogether) -> None:
    """Run what is left of the sweep, so many trials at a time."""
    while trials := list(islice(iter(conduct.next, None), size)):
        _run_bank(conduct, trials, train_together)


def _run_bank(conduct: Conduct, trials: Sequence[tuple[Trial, TrainRun]], train_together: TrainTogether) -> None:
    metric = conduct.study.metric
    members = [_Member(run, metric, partial(conduct.reported, trial)) for trial, run in trials]
    refused = {one: found for one in members if (found := obstacle(one.run, members[0].run)) is not None}
    accepted = [one for one in members if one not in refused]
    try:
        results: Sequence[Any] = train_together([one.part for one in accepted])
    except FAILURES as error:
        results = [error] * len(accepted)
    finally:
        free()
    of_each: dict[_Member, Any] = {**refused, **dict(zip(accepted, results, strict=True))}
    outcomes = [(trial, _outcome(metric, one, of_each[one])) for (trial, _), one in zip(trials, members, strict=True)]
    for trial, outcome in sorted(outcomes, key=lambda one: one[1].missing is not None):  # whether others have the metric
        conduct.ended(trial, outcome)


def _outcome(metric: Metric, member: _Member, result: Any) -> Outcome:
    if member.missing is not None:
        return failed(member.missing)
    if isinstance(result, FAILURES):
        return failed(result)
    if isinstance(result, Exception):
        raise result
    if result is None:
        return Outcome(state="stopped", value=member.listener.latest)
    try:
        return outcome_of(member.run, metric, result, member.listener.latest)
    except MetricMissing as error:
        return failed(error)


class _Member:
    """One trial of a bank: its callbacks, and whether the scheduler has stopped it."""

    def __init__(self, run: TrainRun, metric: Metric, reported: Reported) -> None:
        self.run, self.listener = replace(run, resources=INLINE), Listener(run, metric, reported)
        self.stopped = False
        self.missing: MetricMissing | None = None
        """Its earlier records have no metric."""
        self.part = Part(run=run, sinks=[self.record], on_update=self._update, stops=lambda: self.stopped)

    def record(self, record: Mapping[str, Any]) -> None:
        try:
            self.listener.record(record)
        except Stopped:
            self.stopped = True

    def _update(self, update: Any) -> None:
        try:
            self.listener.update(update)
        except Stopped:
            self.stopped = True
        except MetricMissing as error:
            self.stopped, self.missing = True, error
