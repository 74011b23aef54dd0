"""The state of a sweep: its trials, what each has reported, and which one runs next. Every change is first written to the log."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_llm.config.plain import flat_items
from raytune_llm.config.run import TrainRun
from raytune_llm.config.space import Point
from raytune_llm.config.sweep import Sweep
from raytune_llm.errors import ConfigError
from raytune_llm.tune.events import EVENTS, SweepLog
from raytune_llm.tune.halving import Halving, halving_of
from raytune_llm.tune.metric import Metric
from raytune_llm.tune.population import exploited
from raytune_llm.tune.schedulers import scheduler_of
from raytune_llm.tune.searchers import searcher_of
from raytune_llm.tune.trial import State, Trial

Adopt = Callable[[TrainRun, Path], object]
"""(run, folder): gives the run the checkpoint in another run's folder."""
TRIALS = "trials"
LONGEST_NAME = 60
TABLE, RESULTS, BEST, PAGE = "trials.csv", "results.json", "best.yaml", "sweep.png"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A point with the trials of all its seeds."""

    point: Point
    trials: tuple[Trial, ...]

    @property
    def value(self) -> float | None:
        """The mean of its trials; None until all are finished."""
        values = self.values
        return values[0] if values else None

    @property
    def values(self) -> tuple[float, ...]:
        """The mean of its trials for each metric; empty until all are finished."""
        done = [(trial.value, *trial.others) for trial in self.trials if trial.state == "finished" and trial.value is not None]
        return _means(done) if len(done) == len(self.trials) else ()


class Study:
    def __init__(self, sweep: Sweep, metric: Metric, adopt: Adopt | None = None) -> None:
        """Reads the log in the sweep's folder, if there is one. Raises ConfigError if it is of another sweep. adopt: copies a
        checkpoint, for trials that continue from others."""
        self._adopt = adopt
        self.sweep, self.metric = sweep, metric
        self.trials: list[Trial] = []
        self._searcher, self._scheduler = searcher_of(sweep), scheduler_of(sweep.tune)
        self._halving: Halving | None = halving_of(sweep)
        self._log = SweepLog(sweep.folder)
        self._interrupted: list[Trial] = []
        self._identity = json.loads(json.dumps(sweep.identity))
        self._began = False
        self._resume()

    def _append(self, event: Mapping[str, Any]) -> None:
        """Write an event to the log. The first one is preceded by the sweep's identity; with resume=never, what an earlier sweep
        left in the folder is deleted before it."""
        if not self._began:
            self._began = True
            if self.sweep.run.resume == "never":
                self._clear()
            self._log.append({"event": "sweep", "identity": self._identity})
        self._log.append(event)

    def _clear(self) -> None:
        folder = self.sweep.folder
        shutil.rmtree(folder / TRIALS, ignore_errors=True)
        for name in (EVENTS, TABLE, RESULTS, BEST, PAGE):
            (folder / name).unlink(missing_ok=True)

    def next(self) -> Trial | None:
        """The trial to run next: an interrupted one, a new one, or one that waited. None: all have begun, and none of those that
        wait is to resume now."""
        self._end_lost()  # a crash may have come before it
        while self._interrupted:
            trial = self._interrupted.pop(0)
            if trial.stopping:
                self.end(trial, "stopped", trial.reports[trial.step])
            else:
                return trial
        number = len(self.trials)
        point = self.trials[-1].point if number % self.sweep.tune.seeds else self._ask()
        if point is None:
            return self._promote() if self._halving is not None else self._next_of_round() if self.sweep.tune.rounds else None
        self._append({"event": "began", "trial": number, "point": point})
        return self._begin(number, point)

    def _ask(self) -> Point | None:
        return self._searcher.ask() if self.sweep.tune.trials is None or self._asked < self.sweep.tune.trials else None

    @property
    def _asked(self) -> int:
        """The number of points that the searcher gave."""
        return sum(trial.asked is not None for trial in self.trials) // self.sweep.tune.seeds

    def run_of(self, trial: Trial) -> TrainRun:
        """The run that trains the trial up to its next pause or its end. Raises ConfigError if its values can't be combined."""
        run = self.sweep.trial_run(trial.point, seed=trial.seed, folder=trial.folder)
        pause_at = None if trial.released else self._pause_at(trial)
        rungs = self._scheduler.rungs(trial.number) if self._halving is None else self._halving.rungs
        if rungs is not None and not run.needs_evaluations:
            run = replace(run, train=replace(run.train, eval_at=list(rungs)))
        return run if pause_at is None else replace(run, train=replace(run.train, pause_at=pause_at))

    def _pause_at(self, trial: Trial) -> float | None:
        if self._halving is not None:
            return self._halving.rung_of(trial)
        tune = self.sweep.tune
        if not tune.rounds:
            return tune.pause_at
        end = (trial.round + 1) * tune.grace
        return None if end > 1 - tune.grace / 2 else end  # the last round goes to the end

    def _promote(self) -> Trial | None:
        """A trial that resumes, to the next rung or to its end. None: this depends on trials that still run."""
        assert self._halving is not None
        trial = self._halving.promoted(self.trials)
        if trial is not None:
            self._append({"event": "promoted", "trial": trial.number})
            self._begin_next(trial)
        return trial

    def _begin_next(self, trial: Trial) -> None:
        """Let a trial that waited train its next round."""
        trial.state, trial.value = "running", None
        trial.round += 1

    def _next_of_round(self) -> Trial | None:
        """The first trial of the next round, once all trials wait; None before that."""
        waiting = self.paused
        if not waiting or any(trial.state == "running" for trial in self.trials):
            return None
        assert self._adopt is not None
        taken = list(exploited(self.sweep, waiting, waiting[0].round))
        for trial, donor, point in taken:
            # Before the event is in the log: no trial continues until then, so an interrupted copy can be repeated.
            self._adopt(self.sweep.trial_run(point, seed=trial.seed, folder=trial.folder), donor.folder)
        changed = [{"trial": trial.number, "from": donor.number, "point": point} for trial, donor, point in taken]
        self._append({"event": "exploited", "trials": [trial.number for trial in waiting], "changed": changed})
        self._begin_round([trial.number for trial in waiting], changed)
        return self.next()

    def _begin_round(self, numbers: Sequence[int], changed: Sequence[Mapping[str, Any]]) -> None:
        for number in sorted(numbers):
            trial = self.trials[number]
            self._begin_next(trial)
            self._interrupted.append(trial)
        for change in changed:
            self.trials[change["trial"]].point = change["point"]

    @property
    def seconds_left(self) -> float | None:
        """An estimate for trials that run one after another: by the steps that are left if trials are promoted, else by the mean
        time of those that ended. None: nothing is known yet."""
        total = (self.sweep.tune.trials or len(self.sweep.planned)) * self.sweep.tune.seeds
        if self._halving is None:
            took = [trial.seconds for trial in self.trials if trial.state != "running"]
            return sum(took) / len(took) * (total - len(took)) if took else None
        made = sum(trial.step / trial.total_steps for trial in self.trials if trial.total_steps)
        took_s = sum(trial.seconds for trial in self.trials if trial.total_steps)
        return took_s / made * max(0.0, self._halving.work - made) if made else None

    @property
    def interrupted(self) -> tuple[Trial, ...]:
        return tuple(self._interrupted)

    @property
    def paused(self) -> list[Trial]:
        """Trials that wait, the best first."""
        return sorted((trial for trial in self.trials if trial.state == "paused"), key=self.score_of)

    def release(self, trials: Sequence[Trial]) -> None:
        """Let these trials resume and train to their end. Others that wait are stopped."""
        self._append({"event": "released", "trials": [trial.number for trial in trials]})
        self._release([trial.number for trial in trials])

    def clone(self, trial: Trial, changes: Point) -> Trial:
        """A new trial with other values, which resumes from this one's checkpoint and trains to its end."""
        assert self._adopt is not None
        point = {**trial.point, **changes}
        clone = self._begin(len(self.trials), point, from_=trial)
        self._adopt(self.run_of(clone), trial.folder)
        self._append({"event": "cloned", "trial": clone.number, "from": trial.number, "point": point})
        self._interrupted.append(clone)
        return clone

    def report(self, trial: Trial, step: int, total_steps: int, value: float) -> bool:
        """Record an evaluation's metric. Returns whether the trial continues. A report that is known already changes nothing."""
        if step not in trial.reports:
            event = {"event": "reported", "trial": trial.number, "step": step, "of": total_steps, "value": value}
            self._append(event)
            self._report(trial, step, total_steps, value)
        return not (trial.stopping and step >= trial.step)

    def end(
        self,
        trial: Trial,
        state: State,
        value: float | None,
        reason: str | None = None,
        others: Sequence[float] = (),
        *,
        again: bool = False,
    ) -> list[Trial]:
        """End a trial. others: the values of further metrics. again: a resumed sweep tries the failed trial again. Returns the
        waiting trials that ended with it, since they can't resume any more."""
        event = {"event": "ended", "trial": trial.number, "state": state, "value": value, "seconds": round(trial.seconds, 3)}
        told = {"reason": reason, "others": list(others), "again": again}
        self._append(event | {name: value for name, value in told.items() if value})
        trial.again = again
        self._end(trial, state, value, reason, others)
        return self._end_lost()

    def _end_lost(self) -> list[Trial]:
        """End the waiting trials that can't resume any more."""
        lost = [] if self._halving is None else self._halving.lost(self.trials)
        for trial in lost:
            event = {"event": "ended", "trial": trial.number, "state": "stopped", "value": trial.latest}
            self._append(event | {"seconds": round(trial.seconds, 3)})
            self._end(trial, "stopped", trial.latest, None)
        return lost

    def is_over(self, trial: Trial) -> bool:
        """Whether the trial's setting is complete: trials with all seeds have ended, and none is tried again."""
        trials = self._repetitions(trial)
        return len(trials) == self.sweep.tune.seeds and all(one.over for one in trials)

    def _repetitions(self, trial: Trial) -> list[Trial]:
        """The trials of its setting that have begun, one for each seed."""
        seeds = self.sweep.tune.seeds
        return self.trials[trial.number // seeds * seeds :][:seeds]

    def close(self) -> None:
        self._log.close()

    @property
    def settings(self) -> list[Setting]:
        seeds = self.sweep.tune.seeds
        together = [self.trials[at : at + seeds] for at in range(0, len(self.trials), seeds)]
        return [Setting(point=trials[0].point, trials=tuple(trials)) for trials in together if len(trials) == seeds]

    @property
    def ranked(self) -> list[Setting]:
        """Finished settings, the best first. With several metrics, the Pareto front comes first, ordered by the first metric."""
        done = [setting for setting in self.settings if setting.values]
        front = self._front(done) if self.metric.others else []
        return sorted(done, key=lambda setting: (setting.point not in front, *self._scores(setting)))

    @property
    def front(self) -> list[Setting]:
        """The Pareto front in the order of `ranked`: no other setting is better in one metric and as good in all others."""
        front = self._front(self.settings)
        return [setting for setting in self.ranked if setting.point in front]

    def _front(self, settings: Sequence[Setting]) -> list[Point]:
        scores = [(setting.point, self._scores(setting)) for setting in settings if setting.values]
        return [point for point, own in scores if not any(_dominates(other, own) for _, other in scores)]

    def _scores(self, setting: Setting) -> tuple[float, ...]:
        return tuple(metric.score(value) for metric, value in zip(self.metric.all, setting.values, strict=True))

    def score_of(self, trial: Trial) -> float:
        return math.inf if trial.latest is None else self.metric.score(trial.latest)

    def _resume(self) -> None:
        folder, resume = self.sweep.folder, self.sweep.run.resume
        events = [] if resume == "never" else self._log.read()
        if not events:
            if resume == "must":
                raise ConfigError("resume", f"can't be must where {folder} holds no sweep", fix="Set resume=auto.")
            return
        self._began = True
        first, *others = events
        if first["event"] != "sweep" or "identity" not in first:
            raise self._log.damaged(1, "must say what sweep it is of")
        _same_sweep(folder, first["identity"], self._identity)
        for row, event in enumerate(others, start=2):
            try:
                self._apply(event)
            except (LookupError, TypeError, AssertionError) as error:
                raise self._log.damaged(row, f"doesn't go with those before it ({error!r})") from None
        if self.sweep.tune.pause_at is None and not self.sweep.tune.rounds and self._halving is None:
            for trial in self.paused:
                trial.state = "running"
        self._interrupted = [trial for trial in self.trials if trial.state == "running"]

    def _apply(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "released":
            self._release(event["trials"])
            return
        if event["event"] == "exploited":
            self._begin_round(event["trials"], event["changed"])
            return
        number = event["trial"]
        match event["event"]:
            case "began":
                if number % self.sweep.tune.seeds == 0:
                    self._searcher.ask()  # it draws as it did; what it drew is in the log
                self._begin(number, event["point"])
            case "promoted":
                self._begin_next(self.trials[number])
            case "cloned":
                self._begin(number, event["point"], from_=self.trials[event["from"]])
            case "reported":
                self._report(self.trials[number], event["step"], event["of"], event["value"])
            case "ended" if event.get("again"):
                pass  # the trial counts as interrupted
            case "ended":
                self.trials[number].seconds = event["seconds"]
                self._end(self.trials[number], event["state"], event["value"], event.get("reason"), event.get("others", ()))

    def _release(self, numbers: Sequence[int]) -> None:
        for trial in self.paused:
            if trial.number in numbers:
                trial.state, trial.value, trial.released = "running", None, True
                self._interrupted.append(trial)
            else:
                self._end(trial, "stopped", trial.latest, None)

    def _begin(self, number: int, point: Point, from_: Trial | None = None) -> Trial:
        """from_: the trial that it is a clone of."""
        seeds = self.sweep.tune.seeds
        repetition = number % seeds
        name = f"{number:03d}_{folder_name(point)}" + (f"_seed{repetition}" if seeds > 1 else "")
        trial = Trial(
            number=number,
            point=point,
            seed=self.sweep.run.train.seed + repetition,
            folder=(self.sweep.folder / TRIALS / name).absolute(),
            asked=self._asked if from_ is None else None,
            released=from_ is not None,
        )
        self.trials.append(trial)
        return trial

    def _report(self, trial: Trial, step: int, total_steps: int, value: float) -> None:
        trial.reports[step], trial.total_steps = value, total_steps
        if step < total_steps and not self._scheduler.goes_on(trial.number, step / total_steps, self.metric.score(value)):
            trial.stopping = True

    def _end(self, trial: Trial, state: State, value: float | None, reason: str | None, others: Sequence[float] = ()) -> None:
        trial.state, trial.value, trial.reason, trial.others = state, value, reason, tuple(others)
        if state == "paused" and self._halving is not None:
            self._halving.came(trial, self.score_of(trial))
        if trial.asked is None or not self.is_over(trial):
            return
        seeds, trials = self.sweep.tune.seeds, self._repetitions(trial)
        values = [(one.value, *one.others) for one in trials if one.state != "failed" and one.value is not None]
        scores = None
        if len(values) == seeds:
            scores = [metric.score(mean) for metric, mean in zip(self.metric.all, _means(values), strict=False)]
        reports = [(step, self.metric.score(value)) for step, value in trial.reports.items()]
        self._searcher.tell(trial.asked, reports, scores, whole=all(one.state == "finished" for one in trials))


def _means(values: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(of_metric) / len(of_metric) for of_metric in zip(*values, strict=True))


def _dominates(scores: Sequence[float], others: Sequence[float]) -> bool:
    pairs = list(zip(scores, others, strict=True))
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def folder_name(point: Point) -> str:
    """`base`, `lr=0.001,rank=8`, or a hash if that is long or has other characters."""
    if not point:
        return "base"
    last = {setting.rpartition(".")[2].lstrip("+"): _short(value) for setting, value in point.items()}
    name = ",".join(f"{setting}={value}" for setting, value in last.items())
    if len(last) == len(point) and len(name) <= LONGEST_NAME and all(letter.isalnum() or letter in "=,.-_+" for letter in name):
        return name
    return hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()[:12]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _same_sweep(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(flat_items(then)), dict(flat_items(now))
    changed = [
        f"{path.removeprefix('base.')} from {old.get(path)} to {new.get(path)}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    if changed:
        raise ConfigError(
            "output_dir",
            f"holds another sweep: what changed is {', '.join(changed[:5])}",
            got=str(folder),
            fix="Restore it to resume, choose another output_dir, or set resume=never to start anew there.",
        )
