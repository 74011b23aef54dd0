"""Makes a sweep from the words of a command line: overrides with several values are its space, the others its base.

    sweep = load_sweep(["+experiment=sft_smollm2", "adapter.rank=8,16", "tune=grid"])
    sweep.trial_run({"adapter.rank": 16}, seed=42, folder=Path("outputs/sweep/trials/001")).adapter.rank  # 16

Each trial's run is composed and validated as if its values had been typed, so a sweep can also vary groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from raytune_llm.config.load import Composed, changed, choices_of, compose, section_of, to_run, validate
from raytune_llm.config.options import groups
from raytune_llm.config.override_syntax import as_override, one_value, quoted, swept
from raytune_llm.config.overrides import CONF
from raytune_llm.config.paths import changed_paths, with_absolute_paths
from raytune_llm.config.plain import as_plain, as_text, flat_items, read_yaml
from raytune_llm.config.run import SubmitRun, TrainRun, TuneRun, as_train_run
from raytune_llm.config.sharing import elsewhere, obstacle
from raytune_llm.config.space import (
    Axis,
    Choice,
    Interval,
    Point,
    Values,
    axes_of,
    check,
    check_grid,
    drawn,
    firsts,
    grid,
    of_run,
)
from raytune_llm.config.submit import SubmitConfig
from raytune_llm.config.tune import TuneConfig
from raytune_llm.errors import ConfigError, UserError

VERB = "tune"
GIVEN_BY_THE_SWEEP = ("tune", "output_dir", "name", "resume", "resources", "tracking", "checkpoint.keep")
"""Settings that can't be varied: they are the same for all trials, or the sweep sets them for each."""


COMMAND = "sweep.json"
"""The file in a sweep's folder that holds the words it was started with."""

ON_THE_WAY = ("optimizer.", "schedule.", "stage.", "adapter.dropout", "train.max_grad_norm")
"""Settings that may change when a trial resumes from a checkpoint (prefixes end with a dot)."""

BY_OTHERS = "with tune.scheduler=pbt, where a trial resumes from the checkpoint of another"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The trials of a paused sweep that resume."""

    keep: int | None
    """The number of best trials that resume; the others end. None: the others stay paused."""
    clone: int | None
    """The number of a trial that is copied; the copy resumes with `changes`."""
    changes: Point


@dataclass(frozen=True)
class Sweep:
    """A base run and the space of settings that vary."""

    run: TuneRun
    axes: tuple[Axis, ...]
    words: tuple[str, ...]
    """The overrides of the base."""
    config_dir: str | Path | None = None
    config_name: str | None = None
    command: tuple[str, ...] = ()
    """All words of the command, including those of the space."""
    chosen: Chosen | None = None

    @property
    def tune(self) -> TuneConfig:
        return self.run.tune

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    @property
    def settings(self) -> list[str]:
        """The settings that vary, in the order of the axes."""
        return [setting for axis in self.axes for setting in axis.settings]

    def names(self, points: Iterable[Point]) -> list[str]:
        """`settings`, followed by other settings that tune.first or one of the points sets."""
        return list(dict.fromkeys([*self.settings, *(name for point in (*self.tune.first, *points) for name in point)]))

    def value_of(self, axis: Axis, point: Point) -> Any:
        """The axis's value in the point, or in the base if the point has none."""
        there = all(setting in point for setting in axis.settings)
        return axis.value_in(point if there else {setting: self.base_value(setting) for setting in axis.settings})

    def base_value(self, setting: str) -> Any:
        """The base's value of a setting (for a group, the name of its option); None if the base has no such setting."""
        return self._choices.get(setting.lstrip("+"), of_run(self.base, setting))

    @cached_property
    def _choices(self) -> dict[str, Any]:
        return choices_of(self._with_options([]))

    @cached_property
    def base(self) -> TrainRun:
        return as_train_run(self.run)

    def composes(self, point: Point) -> bool:
        """Whether the run with these values is valid."""
        try:
            self.composed(point)
        except UserError:
            return False
        return True

    def composed(self, point: Point) -> TrainRun:
        """The run with these values, in the sweep's folder. Raises ConfigError that names the values of the point."""
        if not point:
            return self.base
        if (known := self._composed.get(repr(point))) is None:
            known = self._composed[repr(point)] = self._compose(point)
        return known

    @cached_property
    def _composed(self) -> dict[str, TrainRun]:
        """A cache of composed runs, by point."""
        return {}

    def _compose(self, point: Point) -> TrainRun:
        words = {setting: as_override(setting, value) for setting, value in point.items()}
        options = [word for setting, word in words.items() if setting.lstrip("+") in groups()]
        values = [word for word in words.values() if word not in options]
        try:
            composed = self._with_options(options)
            return as_train_run(to_run(VERB, changed(composed, self.config_name or VERB, values) if values else composed))
        except ConfigError as error:
            where = ", ".join(f"{setting}={as_text(value)}" for setting, value in point.items())
            raise ConfigError(error.setting, f"{error.rule} (with {where})", got=error.got, fix=error.fix) from None

    def _with_options(self, options: Sequence[str]) -> Composed:
        """The base with other options for some groups."""
        if (known := self._bases.get(repr(options))) is None:
            chosen = {_setting(word) for word in options}
            words = [*(word for word in self.words if _setting(word) not in chosen), *options]
            known = compose(VERB, words, config_dir=self.config_dir, config_name=self.config_name)
            self._bases[repr(options)] = known
        return known

    @cached_property
    def _bases(self) -> dict[str, Composed]:
        """A cache of composed bases, by options. Points that differ only in values share one."""
        return {}

    def trial_run(self, point: Point, *, seed: int, folder: Path) -> TrainRun:
        """The run of one trial. seed: train.seed of this repetition. folder: its output folder."""
        run = self.composed(point)
        place = {"name": f"{run.name}_{folder.name}", "output_dir": str(folder), "resume": "auto"}
        # Trials over one base see the same packs, which follow from train.seed.
        seeds = {"adapter_seed": seed} if self.tune.share_base is True and self.tune.seeds > 1 else {"seed": seed}
        return replace(run, **place, tracking=run.tracking.of_trial(run.name, folder.name), train=replace(run.train, **seeds))

    @cached_property
    def planned(self) -> list[Point]:
        """The points that are known before the sweep, without repetitions: the base, tune.first, then the points of the grid or
        drawn ones. For a searcher that learns, only those that it starts with."""
        tune = self.tune
        points: list[Point] = []
        seen: list[TrainRun] = []
        for point in self._candidates():
            run = self.composed(point)
            if run in seen:
                continue
            seen.append(run)
            points.append(point)
            if len(seen) == tune.trials:
                break
        return points

    def _candidates(self) -> Iterator[Point]:
        tune = self.tune
        if tune.base_first:
            yield {}
        yield from tune.first
        if tune.enumerates:
            yield from grid(self.axes)
        elif not tune.learns:
            assert tune.trials is not None
            tries = range(50 * tune.trials)  # small spaces are exhausted sooner
            yield from (drawn(self.axes, tune.seed, number) for number in tries)

    def validate(self) -> list[Point]:
        """Returns the planned points. Raises ConfigError unless each of them is valid, and so are each value of a list and both
        ends of each interval."""
        _ = self.ends
        if self.tune.share_base is True and (refused := elsewhere(self.base) or self.unshared) is not None:
            raise refused
        return self.planned

    @cached_property
    def ends(self) -> list[Point]:
        """Each value of a list and both ends of each interval, one after another. Raises ConfigError."""
        return [self._end(axis, value) for axis in self.axes for value in axis.values.ends]

    def _end(self, axis: Axis, value: Any) -> Point:
        """The point with this value, and otherwise the base's settings. If the base can't have the value (a setting of an
        optimizer that another axis chooses), the other axes have their first values."""
        point, values = axis.point(value), axis.values
        try:
            self.composed(point)
        except ConfigError as error:
            beside = {**firsts(self.axes), **point}
            if self.composes(beside):
                return beside
            if not isinstance(values, Interval) or values.whole or not self.composes(axis.point(int(value))):
                raise
            fix = f"Write int(interval({values.low:g},{values.high:g}))."
            raise ConfigError(error.setting, error.rule, got=error.got, fix=fix) from None
        return point

    @cached_property
    def unshared(self) -> ConfigError | None:
        """The first rule that keeps the trials from sharing one base, judged by the planned points; None if there is none."""
        runs = [self.base, *(self.composed(point) for point in (*self.ends, *self.planned))]
        return next((found for run in runs if (found := obstacle(run, self.base)) is not None), None)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that must be the same for a sweep to resume, as plain values: base, space, and how points are chosen."""
        free = {"output_dir", "name", "resume", "resources", "tracking", "checkpoint", "log_format"}
        base = {name: value for name, value in as_plain(with_absolute_paths(self.base)).items() if name not in free}
        how = ("name", "metric", "mode", "scheduler", "grace", "reduction", "seed", "seeds", "first", "base_first")
        space = {axis.name: repr(axis.values) for axis in self.axes}
        return {"base": base, "space": space, "tune": {name: as_plain(self.tune)[name] for name in how}}


def load_sweep(words: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str | None = None) -> Sweep:
    """The sweep that `python -m raytune_llm tune <words>` starts. Raises ConfigError, also for an invalid space."""
    base, space = split(words)
    composes = partial(compose, VERB, config_dir=config_dir, config_name=config_name)
    run, filled = _base(base, space, composes)
    typed = {_setting(word) for word in base}
    for word in base:
        if (setting := _setting(word).removeprefix(f"{VERB}.space.")) in space:
            raise ConfigError(setting, "is given twice", got=word, fix="Give all of its values at once.")
    for setting, values in of_yaml(run.tune.space).items():
        if setting.lstrip("+") not in typed and setting not in space:  # the command line has the last word
            space[setting] = values
    for setting, values in space.items():
        check(setting, values)
        _can_vary(setting)
    if not space:
        fix = "Say, 'optimizer.lr=tag(log,interval(1e-5,1e-3))' or adapter.rank=8,16."
        raise ConfigError("the space", "is empty: no setting has several values", fix=fix)
    axes = axes_of(space, run.tune.zip)
    if run.tune.enumerates:
        check_grid(axes)
    for setting in (setting for axis in axes for setting in axis.settings) if run.tune.rounds else ():
        _can_change_on_the_way(setting, BY_OTHERS)
    for point in run.tune.first:
        if not point:
            raise ConfigError("tune.first", "must hold settings with their values", got="{}", fix="Say, [{optimizer.lr: 1e-4}].")
        for setting in point:
            _can_vary(setting)
            if run.tune.rounds:
                _can_change_on_the_way(setting, BY_OTHERS)
    sweep = Sweep(run, axes, tuple(filled), config_dir, config_name, tuple(words))
    sweep.validate()
    return sweep


def _base(words: Sequence[str], space: Mapping[str, Values], composes: Callable[..., Composed]) -> tuple[TuneRun, Sequence[str]]:
    """The run of the words that give one value, and these words. Where they are no run by themselves (the space has data.path, or
    the experiment), the first value of each setting of the space is one of them, and the base is no trial."""
    beside = dict(space)
    try:
        composed = composes(words)
        beside = of_yaml(section_of(composed, f"{VERB}.space")) | beside
        return to_run(VERB, composed), words
    except ConfigError:
        filled = [*words, *(as_override(setting, values.ends[0]) for setting, values in beside.items())]
        try:
            run = to_run(VERB, composes(filled))
        except UserError:
            run = None
        if run is None or not beside:
            raise
    return replace(run, tune=replace(run.tune, base_first=False)), filled


@dataclass(frozen=True)
class SubmittedSweep:
    """A sweep that runs as a job of a cluster."""

    sweep: Sweep
    submit: SubmitConfig


def load_submitted(
    words: Sequence[str], *, config_dir: str | Path | None = None, config_name: str | None = None
) -> SubmittedSweep:
    """The sweep of `python -m raytune_llm submit tune <words>`. Raises ConfigError as load_sweep does."""
    own = [word for word in words if _setting(word).startswith("submit.")]
    others = [word for word in words if word not in own]
    typed = {_setting(word) for word in others}
    others += [word for word in _on_a_cluster() if _setting(word) not in typed]
    sweep = load_sweep(others, config_dir=config_dir, config_name=config_name)
    submit = section_of(compose("submit", own), "submit")
    run = validate(SubmitRun, {**as_plain(as_train_run(sweep.run)), "submit": submit})
    return SubmittedSweep(sweep, run.submit)


def _on_a_cluster() -> Iterator[str]:
    """The differences between conf/submit.yaml and conf/train.yaml, as words of a command line."""
    values = read_yaml(CONF / "submit.yaml", setting="submit")
    for entry in values.pop("defaults"):
        for group, option in entry.items() if isinstance(entry, dict) else ():
            yield f"{group.removeprefix('override ')}={option}"
    del values["submit"]
    for setting, value in flat_items(values):
        yield as_override(setting, value)


def _setting(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def command_of(sweep: Sweep) -> str:
    """The content of the file COMMAND: the sweep's words as JSON. They work from any folder: their paths are absolute, except
    those of options that the sweep chooses among."""
    config_dir = None if sweep.config_dir is None else str(Path(sweep.config_dir).absolute())
    varied = {name.lstrip("+") for name in sweep.names(())}
    absolute = [
        as_override(setting, value)
        for setting, value in changed_paths(sweep.run, with_absolute_paths(sweep.run)).items()
        if varied.isdisjoint({setting, setting.partition(".")[0], "experiment"})
    ]
    words = [*sweep.command, *absolute]
    return json.dumps({"words": words, "config_dir": config_dir, "config_name": sweep.config_name})


def load_paused(words: Sequence[str]) -> Sweep:
    """The sweep that `python -m raytune_llm tune resume <words>` resumes. The words are its folder, and then keep=3, or clone=4
    with settings."""
    folder, rest = Path(words[0]) if words else Path(), words[1:]
    try:
        then = json.loads((folder / COMMAND).read_text())
        words_then, config_dir, config_name = (then[name] for name in ("words", "config_dir", "config_name"))
        others = [word for word in words_then if word.partition("=")[0] not in ("output_dir", "resume")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ConfigError("tune resume", "needs the folder of a sweep", got=str(folder), fix="Say, outputs/sweep.") from None
    given = dict(pairs := [one_value(word) for word in rest])
    if len(given) < len(pairs):
        raise ConfigError("tune resume", "has a setting twice", got=" ".join(rest))
    keep, clone = (_whole(name, given.pop(name, None)) for name in ("keep", "clone"))
    if keep is None and clone is None:
        raise ConfigError("tune resume", "must say which trials resume", fix="Say, keep=3, or clone=4 optimizer.lr=1e-4.")
    if bool(given) != (clone is not None):
        raise ConfigError(
            "clone", "goes with the settings that it changes", got=list(rest), fix="Say, clone=4 optimizer.lr=1e-4."
        )
    if keep == 0 and clone is None:
        raise ConfigError("keep", "must be at least 1: with 0 no trial resumes", got=keep)
    place = f"output_dir={quoted(str(folder.absolute()))}"
    sweep = load_sweep([*others, place, "resume=must"], config_dir=config_dir, config_name=config_name)
    for setting in given:
        _can_change_on_the_way(setting, "by a clone, which resumes from the checkpoint of its trial")
    sweep.composed(given)
    return replace(sweep, chosen=Chosen(keep=keep, clone=clone, changes=given))


def _whole(name: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(name, "must be a whole number", got=value)
    return value


def split(words: Sequence[str]) -> tuple[list[str], dict[str, Values]]:
    """Overrides that give one value, and those that give several. Raises ConfigError where a setting is given twice."""
    base: list[str] = []
    space: dict[str, Values] = {}
    given: set[str] = set()
    for word in words:
        setting = _setting(word)
        found = None if setting.startswith(f"{VERB}.space") or word.startswith("~") else swept(word)
        if setting in given and (found or setting in {name.lstrip("+") for name in space}):
            raise ConfigError(setting, "is given twice", got=word, fix="Give all of its values at once, or one.")
        given.add(setting)
        if found is None:
            base.append(word)
        else:
            space[found[0]] = found[1]
    return base, space


def of_yaml(space: Mapping[str, Any], prefix: str = "") -> dict[str, Values]:
    """The space in tune.space. Its leaves are lists of values, or text as on the command line. Its keys may be nested like the
    run's settings, or dotted, or both."""
    found: dict[str, Values] = {}
    for name, leaf in space.items():
        setting = f"{prefix}{name}"
        if isinstance(leaf, Mapping):
            inner = of_yaml(leaf, f"{setting}.")
        elif isinstance(leaf, list):
            inner = {setting: Choice(tuple(leaf))}
        else:
            read = swept(f"{setting}={leaf}")
            if read is None:
                fix = "Write a list, or text such as tag(log,interval(1e-5,1e-3))."
                raise ConfigError(f"tune.space.{setting}", "must have several values", got=leaf, fix=fix)
            inner = dict([read])
        for one in inner:
            if one in found:
                raise ConfigError(f"tune.space.{one}", "is given twice", fix="Give all of its values at once.")
        found |= inner
    return found


def can_change_on_the_way(setting: str) -> bool:
    return setting.lstrip("+").startswith(ON_THE_WAY)


def _can_change_on_the_way(setting: str, why: str) -> None:
    """Raises ConfigError unless the setting may change when a trial resumes. why: the feature that resumes it, for the
    message."""
    if not can_change_on_the_way(setting):
        there = ", ".join(f"{name}*" if name.endswith(".") else name for name in ON_THE_WAY)
        raise ConfigError(setting, f"can't be varied {why}", fix=f"What can be varied: {there}.")


def _can_vary(setting: str) -> None:
    plain = setting.lstrip("+")
    if plain.partition(".")[0] in GIVEN_BY_THE_SWEEP or plain in GIVEN_BY_THE_SWEEP:
        raise ConfigError(plain, "can't be varied: it is the same for all trials, or a trial's own", fix="Give it one value.")
    if plain == "train.seed":
        raise ConfigError(plain, "can't be varied: seeds are averaged", fix="Set tune.seeds=3 to repeat each setting.")
