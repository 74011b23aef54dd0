"""Updates a study when a trial starts, reports and ends, in whatever process it trains."""

from __future__ import annotations

import time
from collections.abc import Callable

from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ResourceError, UserError
from raytune_llm.tune.results import prune, write_results
from raytune_llm.tune.study import Study
from raytune_llm.tune.trial import Outcome, Trial, failed

OnChange = Callable[[Study, Trial], None]


class Conduct:
    def __init__(self, study: Study, on_change: OnChange) -> None:
        self.study = study
        self._on_change = on_change
        self._began: dict[int, float] = {}
        self._failures = 0
        """The number of trials that failed in a row."""

    def next(self) -> tuple[Trial, TrainRun] | None:
        """The next trial, and its config with absolute paths, because workers have other working folders. A trial with
        incompatible values ends with the reason, and does not count as one of tune.max_failures."""
        while (trial := self.study.next()) is not None:
            self._began[trial.number] = time.monotonic() - trial.seconds
            self._on_change(self.study, trial)
            try:
                return trial, with_absolute_paths(self.study.run_of(trial))
            except UserError as error:
                self._end(trial, failed(error))
        prune(self.study)
        return None

    def reported(self, trial: Trial, step: int, total_steps: int, value: float) -> bool:
        """Record a metric. Returns whether the trial is to continue."""
        goes_on = self.study.report(trial, step, total_steps, value)
        trial.seconds = time.monotonic() - self._began[trial.number]
        self._on_change(self.study, trial)
        return goes_on

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Record the end of a trial. Raises ResourceError if too many trials failed in a row, and ConfigError if it has no metric
        and no other one has any."""
        if outcome.missing is not None and all(one.value is None for one in self.study.trials):
            raise outcome.missing
        self._end(trial, outcome)
        self._failures = self._failures + 1 if outcome.state == "failed" else 0
        if self._failures == self.study.sweep.tune.max_failures:
            raise ResourceError(
                f"{self._failures} trials failed one after another, the last one since {(trial.reason or '').rstrip('.')}",
                "Correct it, or raise tune.max_failures; the same command resumes the sweep.",
            )

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        trial.seconds = time.monotonic() - self._began[trial.number]
        lost = self.study.end(trial, outcome.state, outcome.value, outcome.reason, outcome.others, again=outcome.again)
        prune(self.study)
        write_results(self.study)
        for one in (trial, *lost):
            self._on_change(self.study, one)
