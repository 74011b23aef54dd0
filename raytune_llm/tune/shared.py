"""Trials that share a base (tune.share_base): as many at a time as a bank of adapters holds, in one pass a step.

All trials of a bank come to a rung at the same step, and are judged there in the order of their numbers: ASHA and HyperBand
compare a trial with those before it at that rung, as where trials run one after another, and decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from raytune_llm.config.run import TrainRun
from raytune_llm.config.sharing import obstacle
from raytune_llm.config.sweep import Sweep
from raytune_llm.data.kinds import KINDS
from raytune_llm.runs.together import Part, device_here, how_many
from raytune_llm.runs.workspace import Workspace
from raytune_llm.tune.conduct import Conduct
from raytune_llm.tune.metric import Metric, MetricMissing
from raytune_llm.tune.study import Trial
from raytune_llm.tune.trial import FAILURES, Listener, Outcome, Reported, Stopped, free, reason_of, records_of

TrainTogether = Callable[..., Sequence[Any]]
"""api.train_together."""
PAYS_BELOW = {"cuda": 2048, "cpu": 0}
"""Tokens of a trial's pass: with more, several trials in one pass are hardly faster. On one H100, a loop over 8 layers of an 8B
model made 6.3 times the tokens per second with 8 adapters of one's at 256 tokens, 2.1 times at 1,024, and as many at 4,096."""


def trials_together(sweep: Sweep, workspace: Workspace) -> tuple[int, str]:
    """How many trials at a time are computed in one pass, and why; 1 where they run one after another."""
    asked, run = sweep.tune.share_base, sweep.base
    if asked is False or (asked == "auto" and (sweep.unshared is not None or _changes_the_search(sweep))):
        return 1, ""
    device = device_here()
    tokens = run.train.micro_batch_size * run.data.max_length * KINDS[run.stage.kind].sides
    if asked == "auto" and tokens >= PAYS_BELOW[device.type]:
        return 1, ""
    trials = (sweep.tune.trials or len(sweep.planned)) * sweep.tune.seeds
    why = "asked for" if asked is True else f"passes of {tokens:,} tokens leave the GPU idle"
    return min(how_many(_largest(sweep), device, workspace), trials), why


def _changes_the_search(sweep: Sweep) -> bool:
    """Trials that begin together know nothing of each other's ends, and repeated seeds would have the same packs."""
    return sweep.tune.learns or sweep.tune.rounds or sweep.tune.scheduler == "median" or sweep.tune.seeds > 1


def _largest(sweep: Sweep) -> TrainRun:
    """With the highest rank of those that are known beforehand: banks have room for it in every slot."""
    runs = [sweep.base, *(sweep.composed(point) for point in sweep.planned)]
    return max(runs, key=lambda run: getattr(run.adapter, "rank", 0))


def run_banks(conduct: Conduct, size: int, train_together: TrainTogether) -> None:
    """Run what is left of the sweep, so many trials at a time."""
    while trials := list(islice(iter(conduct.next, None), size)):
        _run_bank(conduct, trials, train_together)


def _run_bank(conduct: Conduct, trials: Sequence[Trial], train_together: TrainTogether) -> None:
    metric = conduct.study.metric
    heard = [_Heard(conduct.run_of(trial), metric, partial(conduct.reported, trial)) for trial in trials]
    refused = {one: found for one in heard if (found := obstacle(one.run, heard[0].run)) is not None}
    going = [one for one in heard if one not in refused]
    try:
        results: Sequence[Any] = train_together([one.part for one in going])
    except MetricMissing:
        raise
    except FAILURES as error:
        results = [error] * len(going)
    finally:
        free()
    of_each: dict[_Heard, Any] = {**refused, **dict(zip(going, results, strict=True))}
    for trial, one in zip(trials, heard, strict=True):
        conduct.ended(trial, _outcome(metric, one, of_each[one]))


def _outcome(metric: Metric, heard: _Heard, result: Any) -> Outcome:
    if isinstance(result, MetricMissing):
        raise result
    if isinstance(result, FAILURES):
        return Outcome(state="failed", value=None, reason=reason_of(result))
    if isinstance(result, Exception):
        raise result
    if result is None:
        return Outcome(state="stopped", value=heard.listener.latest)
    if result.paused:
        return Outcome(state="paused", value=heard.listener.latest)
    best = heard.run.checkpoint.final == "best"
    return Outcome(state="finished", value=metric.of_trial(records_of(heard.run), result, best=best))


class _Heard:
    """What is heard of one trial, and whether it is to go on."""

    def __init__(self, run: TrainRun, metric: Metric, reported: Reported) -> None:
        self.run, self.listener = run, Listener(run, metric, reported)
        self.stopped = False
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
