"""`tune`: the trials of a sweep while they run, and the best of them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytune_llm import api
from raytune_llm.byte_size import in_units
from raytune_llm.config.override_syntax import as_word
from raytune_llm.config.plain import as_text
from raytune_llm.config.sweep import Sweep, can_change_on_the_way
from raytune_llm.report.events import EventLog
from raytune_llm.report.facts import print_facts
from raytune_llm.tune.metric import metric_of
from raytune_llm.tune.study import BEST, PAGE, RESULTS, TABLE, Study
from raytune_llm.tune.trial import Trial

if TYPE_CHECKING:
    from raytune_llm.runs.plan import Plan
    from raytune_llm.tune.run import TuneResult

SHOWN = 20
"""The live table has the latest trials, at most this many."""
STYLES = {"running": "bold", "paused": "yellow", "finished": "green", "stopped": "dim", "failed": "red"}


def main(sweep: Sweep) -> int:
    metric_of(sweep.tune)  # raises before anything is printed if the metric's function can't be imported
    console = Console()
    if sweep.tune.dry_run:
        return _dry_run(sweep, console)
    scheduler = f", {sweep.tune.scheduler}" if sweep.tune.compares else ""
    objectives = ", ".join(f"{better} {metric}" for metric, better in sweep.tune.objectives.items())
    console.print(
        f"[bold]{escape(sweep.run.name)}[/bold]: {sweep.tune.name} over {', '.join(axis.name for axis in sweep.axes)}"
        f"{scheduler}; {objectives}",
        highlight=False,
        soft_wrap=True,
    )
    progress = _Progress(console, sweep)
    try:
        with progress:
            notify = partial(console.print, highlight=False, markup=False)
            result = api.tune(sweep, on_change=progress.changed, notify=notify)
    except KeyboardInterrupt as interrupt:
        command = shlex.join(["python", "-m", "raytune_llm", *(word for word in sys.argv[1:] if word != "resume=never")])
        interrupt.add_note(f"{progress.standing()}this resumes the sweep: {command}")
        raise
    if result.paused:
        _print_paused(console, sweep, result.study)
    else:
        print_best(console, sweep, result)
    if sweep.run.log_format == "json":  # `jobs` and `submit` read these files from the log
        EventLog().files(sweep.folder / name for name in (TABLE, RESULTS, BEST))
    return 0


class _Progress:
    """Shows the trials: a live table on a terminal, elsewhere one line whenever a trial changes its state."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        self._console, self._sweep = console, sweep
        self._study: Study | None = None
        self._began = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self._printed: set[tuple[int, str, int]] = set()

    def __enter__(self) -> _Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        sys.stdout.flush()

    def changed(self, study: Study, trial: Trial) -> None:
        self._study = study
        if self._live is not None:
            self._live.update(Group(trials_table(study), self._left(study)), refresh=True)
            return
        if (shown := (trial.number, trial.state, trial.round)) in self._printed:
            return
        self._printed.add(shown)
        values = ", ".join(f"{name}={_text(value)}" for name, value in trial.point.items()) or "base"
        figure = "" if trial.latest is None else f" {study.metric.name} {trial.latest:.4f}"
        at = "" if trial.total_steps is None else f" at step {trial.step} of {trial.total_steps}"
        why = f": {trial.reason}" if trial.reason else ""
        self._console.print(
            f"trial {trial.number} {trial.state}: {values}{figure}{at}{why}", highlight=False, markup=False, soft_wrap=True
        )

    def standing(self) -> str:
        if self._study is None:
            return ""
        ended = sum(trial.state not in ("running", "paused") for trial in self._study.trials)
        return f"{ended} trials ended; "

    def _left(self, study: Study) -> Text:
        total = (self._sweep.tune.trials or len(self._sweep.planned)) * self._sweep.tune.seeds
        states = [trial.state for trial in study.trials]
        ended = len(states) - states.count("running") - states.count("paused")
        waiting = f", {states.count('paused')} wait" if "paused" in states else ""
        left = study.seconds_left
        time_left = f", about {_duration(left)} left" if left else ""
        return Text(f"{ended} of {total} trials ended{waiting}{time_left}", style="dim")


def trials_table(study: Study) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    settings = study.sweep.names(trial.point for trial in study.trials)
    for name in ("trial", *settings, "step", study.metric.name, "state"):
        table.add_column(name, overflow="fold")
    best = study.ranked[0].trials if study.ranked else ()
    for trial in study.trials[-SHOWN:]:
        values = [escape(_text(trial.point[name])) if name in trial.point else "base" for name in settings]
        at = f"{trial.step}/{trial.total_steps}" if trial.total_steps else ""
        figure = "" if trial.latest is None else f"{trial.latest:.4f}"
        state = "best" if trial in best else trial.state
        table.add_row(str(trial.number), *values, at, figure, state, style="bold green" if trial in best else STYLES[trial.state])
    return table


def _dry_run(sweep: Sweep, console: Console) -> int:
    """Print each planned trial with its memory and time. Returns exit code 1 if one does not fit."""
    points = sweep.planned
    settings = sweep.names(points)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("trial", *settings, "steps", "memory", "fits", "time, at least"):
        table.add_column(name, overflow="fold")
    plans = [api.plan(sweep.composed(point), in_sweep=True) for point in points]
    rate = api.products_per_s()
    seconds = [at_least_s(plan, rate) for plan in plans]
    for number, (point, plan, time_s) in enumerate(zip(points, plans, seconds, strict=True)):
        values = [escape(_text(point[name])) if name in point else "base" for name in settings]
        steps = "not prepared" if plan.data is None else f"{plan.data.total_steps:,}"
        memory = in_units(plan.memory.total, 2)
        fits = "yes" if plan.verdicts[0].fits else "no"
        table.add_row(str(number), *values, steps, memory, fits, "" if time_s is None else _duration(time_s))
    console.print(table, highlight=False)
    more = "" if not sweep.tune.learns else f", and {(sweep.tune.trials or 0) - len(points)} that optuna chooses"
    known = [time_s for time_s in seconds if time_s is not None]
    total = f"; one after another at least {_duration(sum(known) * sweep.tune.seeds)} without early stops" if known else ""
    seeds = f", of {sweep.tune.seeds} seeds each" if sweep.tune.seeds > 1 else ""
    console.print(f"\n{len(points)} trials{more}{seeds}{total}. Nothing was run.", highlight=False)
    return 0 if all(plan.verdicts[0].fits for plan in plans) else 1


def at_least_s(plan: Plan, products_per_s: float) -> float | None:
    """A lower bound on a trial's training time in seconds, counting matrix products only, at products_per_s FLOP/s of each
    worker's GPU, or of the CPU that the workers share. None before the data are prepared."""
    devices = 1 if plan.verdicts[0].device.shared else plan.world_size
    return None if plan.least_operations is None else plan.least_operations / (products_per_s * devices)


def print_best(console: Console, sweep: Sweep, result: TuneResult) -> None:
    best, study = result.best, result.study
    states = [trial.state for trial in study.trials]
    values = ", ".join(f"{name}={_text(value)}" for name, value in best.point.items()) or "the base configuration"
    trials = f"{states.count('finished')} finished, {states.count('stopped')} stopped early, {states.count('failed')} failed"
    model = escape(str(result.folder / "final")) if sweep.tune.keep else "none is kept (tune.keep=0)"
    console.print()
    print_facts(
        console,
        [
            ("best", escape(values)),
            *((metric.name, f"{value:.4f}") for metric, value in zip(study.metric.all, best.values, strict=True)),
            ("trials", trials),
            ("model", model),
            ("table", escape(str(sweep.folder / TABLE))),
            ("plots", escape(str(sweep.folder / PAGE))),
        ],
    )
    if study.metric.others:
        console.print("\nPareto front:", highlight=False)
    for setting in study.front if study.metric.others else ():
        figures = ", ".join(f"{metric.name} {value:.4f}" for metric, value in zip(study.metric.all, setting.values, strict=True))
        values = ", ".join(f"{name}={_text(value)}" for name, value in setting.point.items()) or "base"
        console.print(f"  {figures}: {values}", highlight=False, markup=False, soft_wrap=True)
    command = f"python -m raytune_llm --config-dir {shlex.quote(str(sweep.folder))} --config-name best"
    _print_next(console, {command: "trains the best setting again"})


def _print_paused(console: Console, sweep: Sweep, study: Study) -> None:
    console.print()
    for trial in study.paused:
        values = ", ".join(f"{name}={_text(value)}" for name, value in trial.point.items()) or "the base configuration"
        figure = "" if trial.latest is None else f"{study.metric.name} {trial.latest:.4f}, "
        console.print(f"trial {trial.number} waits at step {trial.step}: {figure}{values}", highlight=False, markup=False)
    command = f"python -m raytune_llm tune resume {shlex.quote(str(sweep.folder))}"
    commands = {f"{command} keep=3": "trains the best three to their end"}
    if (change := _change(sweep, study.paused)) is not None:
        clone = f"{command} clone={study.paused[0].number} {shlex.quote(as_word(*change))}"
        commands[clone] = "trains one with another value, from where it is"
    _print_next(console, commands)


def _change(sweep: Sweep, waiting: Sequence[Trial]) -> tuple[str, Any] | None:
    """A setting and a value of another trial that the best paused trial could resume with; None if there is none."""
    first, *others = waiting
    for setting in filter(can_change_on_the_way, sweep.settings):
        for value in (trial.point.get(setting) for trial in others):
            new = value is not None and value != first.point.get(setting)
            if new and sweep.composes({setting: value}) and sweep.composes({**first.point, setting: value}):
                return setting, value
    return None


def _print_next(console: Console, commands: Mapping[str, str]) -> None:
    """Print each command on one unwrapped line, so that it can be copied, and what it does below it."""
    console.print()
    for begin, (command, does) in zip(["Next: ", *["      "] * len(commands)], commands.items(), strict=False):
        console.print(f"{begin}[bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)
        console.print(f"      ({does})", highlight=False, style="dim", soft_wrap=True)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
