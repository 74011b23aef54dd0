"""The `tune` group: how a sweep chooses its settings, compares its trials and stops the worse ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.errors import ConfigError

Mode = Literal["auto", "min", "max"]
MODES = {"loss": "min", "perplexity": "min", "accuracy": "max", "accuracies": "max", "margins": "max", "exact_match": "max"}
"""The end of a metric's name -> whether lower or higher is better."""
EVALUATIONS, EXACT_MATCH = "eval_", "exact_match"


@section
class TuneConfig:
    name: Literal["grid", "random", "optuna"]
    """How the settings of the next trial are chosen. grid: all combinations. random: drawn with `seed`. optuna: by Optuna's TPE
    sampler, which learns from earlier trials."""
    trials: PositiveInt | None
    """Number of settings to try, including the base and `first`. null: all of a grid."""
    metric: str | Annotated[list[str], Field(min_length=2)]
    """eval_loss or another metric of an evaluation; exact_match; or module:function, which is called with a trial's TrainResult.
    With several, such as [eval_loss,module:seconds], the results show the Pareto front, and the first metric decides which
    setting is best."""
    mode: Mode | list[Mode]
    """Whether a lower or a higher metric is better; a list for several metrics. auto: by the metric's name."""
    scheduler: Literal["none", "asha", "median", "hyperband", "pbt"]
    """Which rule stops trials early, at their evaluations. pbt stops none: the worst trials continue from copies of the best."""
    grace: Annotated[float, Field(gt=0, lt=1)]
    """The fraction of its steps that every trial trains before it can be stopped (the first rung). pbt: the length of a round, as
    a fraction of the steps."""
    reduction: Annotated[int, Field(ge=2)]
    """asha, hyperband: the best 1/reduction of the trials at a rung continue to the next rung, which has `reduction` times as
    many steps. pbt: the worst 1/reduction of the trials are replaced by copies of the best."""
    seed: Seed
    """The seed that values are drawn with. All trials train with train.seed."""
    seeds: PositiveInt
    """Train each setting with this many seeds (train.seed, train.seed + 1, ...), and compare settings by the mean."""
    zip: list[list[str]]
    """Settings whose values change together: [[adapter.rank, adapter.alpha]]."""
    first: list[dict[str, Any]]
    """Settings to try first, for example known good ones: [{optimizer.lr: 1e-4}]."""
    base_first: bool
    """Make the base configuration, without any value of the space, the first trial."""
    pause_at: Annotated[float, Field(gt=0, lt=1)] | None
    """Train all trials to this fraction of their steps, then pause the sweep. `tune resume` chooses the trials that continue."""
    max_concurrent: PositiveInt | None
    """Maximum number of trials at the same time. null: as many as there are CPUs and GPUs for and as fit in memory by plan's
    estimate; with a shared base, 16."""
    keep: NonNegativeInt
    """Number of best trials that keep their model and checkpoints."""
    max_failures: PositiveInt
    """Stop the sweep after this many failed trials in a row."""
    share_base: bool | Literal["auto"]
    """Train several trials in one forward and backward pass over one base, each as an adapter of its own. auto: if the space
    permits it, and if it is faster or max_concurrent separate processes don't fit on the GPU. The choice is printed."""
    dry_run: bool
    """Show the trials and the resources that they need, and run nothing (--dry-run)."""
    space: dict[str, Any]
    """Setting -> values, as on the command line: {optimizer.lr: "tag(log,interval(1e-5,1e-3))", adapter.rank: [8, 16]}."""

    def __post_init__(self) -> None:
        if self.name != "grid" and self.trials is None:
            raise ConfigError("tune.trials", f"must be given where tune={self.name}", got="null", fix="Say, tune.trials=16.")
        if self.at_end and self.compares:
            raise ConfigError(
                "tune.scheduler",
                f"must be none where tune.metric={shown(self.metric)}, which is known at a trial's end",
                got=self.scheduler,
                fix="Set tune.scheduler=none, or a metric of an evaluation.",
            )
        if self.rounds and (self.learns or self.pause_at is not None):
            other = "tune=random or grid" if self.learns else "tune.pause_at=null"
            raise ConfigError(
                "tune.scheduler", f"can be pbt with {other}", got=self.scheduler, fix="Set it, or another scheduler."
            )
        if self.pause_at is not None and (self.at_end or self.seeds > 1):
            why = "tune.seeds=1" if self.seeds > 1 else f"a metric of an evaluation, which {shown(self.metric)} is not"
            raise ConfigError("tune.pause_at", f"needs {why}", got=self.pause_at, fix="Leave it out.")
        if self.share_base is True and self.rounds:
            raise ConfigError(
                "tune.share_base",
                f"can't be true where tune.scheduler={self.scheduler}, whose trials take each other's adapters",
                got=True,
                fix="Set tune.share_base=false.",
            )
        if self.seeds > 1 and self.compares:
            raise ConfigError(
                "tune.seeds",
                "must be 1 where trials are ended early: a setting is judged by the mean of its seeds, at their end",
                got=self.seeds,
                fix="Set tune.scheduler=none.",
            )
        self._check_several()
        for metric, better in self.objectives.items():
            if better is None:
                raise ConfigError(
                    "tune.mode", f"must be min or max: tune.metric={metric} doesn't say which is better", got=shown(self.mode)
                )

    def _check_several(self) -> None:
        metrics, modes = self.metrics, self.mode if isinstance(self.mode, list) else [self.mode]
        if len(set(metrics)) < len(metrics):
            raise ConfigError("tune.metric", "has a metric twice", got=shown(self.metric), fix="Take it out.")
        if len(modes) != len(metrics) and self.mode != "auto":
            fix = f"Say, tune.mode=[{','.join(['min'] * len(metrics))}]." if len(metrics) > 1 else "Say, tune.mode=min."
            rule = f"must be one for each of {len(metrics)} metrics" if len(metrics) > 1 else "must be one value for one metric"
            raise ConfigError("tune.mode", rule, got=shown(self.mode), fix=fix)
        if len(metrics) == 1:
            return
        for setting, plain, there in (
            ("tune.scheduler", "none", self.compares),
            ("tune.pause_at", "null", self.pause_at is not None),
        ):
            if there:
                rule = f"must be {plain} with several metrics: trials are compared by one alone before their end"
                raise ConfigError(setting, rule, got=getattr(self, setting[5:]), fix=f"Set {setting}={plain}, or one metric.")

    @property
    def compares(self) -> bool:
        """Whether trials are compared before their end."""
        return self.scheduler != "none"

    @property
    def rounds(self) -> bool:
        """Whether all trials train to the same step and wait for each other there."""
        return self.scheduler == "pbt"

    @property
    def promotes(self) -> bool:
        """Whether trials wait at rungs, from which the best resume. Not if the searcher learns (it needs results early), and not
        if all trials pause for the user."""
        return self.scheduler == "asha" and not self.learns and self.pause_at is None

    @property
    def stops_early(self) -> bool:
        """Whether a trial may end at one of its evaluations."""
        return self.scheduler in ("asha", "hyperband", "median")

    @property
    def says_where_to_evaluate(self) -> bool:
        """Whether the sweep decides when trials are evaluated, so that `train.eval_every_steps` is not needed."""
        return self.scheduler in ("asha", "hyperband", "pbt")

    @property
    def enumerates(self) -> bool:
        """Whether every combination of the values is a trial."""
        return self.name == "grid"

    @property
    def compares_running(self) -> bool:
        """Whether a trial's evaluation is compared with evaluations of trials that still run."""
        return self.scheduler == "median"

    @property
    def learns(self) -> bool:
        """Whether the searcher uses the results of earlier trials."""
        return self.name == "optuna"

    @property
    def at_end(self) -> bool:
        """Whether one of the metrics is known only at a trial's end."""
        return any(known_at_end(metric) for metric in self.metrics)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.metric) if isinstance(self.metric, list) else (self.metric,)

    @property
    def objectives(self) -> dict[str, str | None]:
        """Metric -> min or max, or None if neither the mode nor the name says which."""
        modes = self.mode if isinstance(self.mode, list) else [self.mode] * len(self.metrics)
        return {metric: _better(metric, mode) for metric, mode in zip(self.metrics, modes, strict=True)}


def known_at_end(metric: str) -> bool:
    """Whether the metric is known only at a trial's end."""
    return metric == EXACT_MATCH or ":" in metric


def shown(value: Any) -> str:
    """The value as it is typed on the command line."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _better(metric: str, mode: str) -> str | None:
    if mode != "auto":
        return mode
    ending = metric.rpartition("/")[2].removeprefix(EVALUATIONS)
    return next((better for word, better in MODES.items() if ending.endswith(word)), None)
