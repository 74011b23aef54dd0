"""The models of an evaluation, grouped by base: one engine computes the base and its adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_llm import packaged
from raytune_llm.config.data import DataConfig
from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.load import load_config
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.paths import expanded
from raytune_llm.config.run import EvaluateRun
from raytune_llm.config.serve import ServedModels
from raytune_llm.errors import ConfigError
from raytune_llm.finished import FINAL
from raytune_llm.models.adapters.saved import base_of
from raytune_llm.predict.models import check_run_writes, check_writes, served_with
from raytune_llm.runs.trained import RENDERING, Trained, read_trained
from raytune_llm.serve.engines import lone_adapter

RENDERS = (*RENDERING, "enable_thinking", "preserve_thinking")


@dataclass
class Group:
    """Models on one engine. An adapter that can't share a batch is a group of its own."""

    model: ModelConfig
    data: DataConfig
    """The data section; only its chat template settings are used."""
    adapters: dict[str, str]
    with_base: str | None
    """The name under which the base itself is evaluated; None: it is not."""
    of_adapters: bool = False
    """Whether more adapters can be added."""

    @property
    def names(self) -> list[tuple[str, str | None]]:
        """Name of the result -> its adapter; None: the base."""
        base: list[tuple[str, str | None]] = [] if self.with_base is None else [(self.with_base, None)]
        return [*base, *((name, name) for name in self.adapters)]

    def served(self, settings: EvaluateConfig) -> ServedModels:
        return served_with(
            self.adapters,
            max_rank=None,
            precision=settings.precision,
            max_length=settings.max_length,
            template=self.data.template,
        )


@dataclass(frozen=True)
class _Asked:
    """An entry of evaluate.models."""

    name: str
    model: ModelConfig
    data: DataConfig
    adapter: str | None
    """Its folder."""
    on_given_base: bool = False
    """Whether it is an adapter of `model`, the base that the command names."""


def groups_of(run: EvaluateRun) -> list[Group]:
    """The groups to evaluate. Raises ConfigError for an entry that is neither a run nor a model, is not a language model, or has
    the name of another entry."""
    settings = run.evaluate
    if not settings.models:
        name = Path(str(run.model.path or "model")).name
        return [Group(run.model, _rendering(run, None), {}, name)]
    groups: list[Group] = []
    bases: list[tuple[Group, str]] = []
    """The groups of which the base is evaluated too."""
    entries = _asked(run)
    for one in entries:
        if one.adapter is None:
            groups.append(Group(one.model, one.data, {}, one.name))
            continue
        check_writes(one.adapter, "evaluate.models")
        alike = [group for group in groups if group.of_adapters and _same_base(group, one)]
        if settings.base and not alike:
            alike.append(Group(one.model, one.data, {}, Path(str(one.model.path)).name, of_adapters=True))
            groups.append(alike[0])
            bases.append((alike[0], one.name))
        own = Group(one.model, one.data, {one.name: one.adapter}, None, of_adapters=True)
        if lone_adapter(own.served(settings), run.engine) is not None:
            groups.append(replace(own, of_adapters=False))
        elif alike:
            alike[0].adapters[one.name] = one.adapter
        else:
            groups.append(own)
    _name_apart(bases, [one.name for one in entries])
    return groups


def _same_base(group: Group, one: _Asked) -> bool:
    return group.model == one.model and written_alike(group.data, one.data)


def _asked(run: EvaluateRun) -> list[_Asked]:
    found: dict[str, _Asked] = {}
    for place in run.evaluate.models:
        one = _entry(run, place)
        if twice := [other for other in found.values() if (other.model, other.adapter) == (one.model, one.adapter)]:
            raise ConfigError("evaluate.models", f"must hold each model once: this is {twice[0].name}, too", got=place)
        if one.name in found:
            one = replace(one, name=f"{one.name} in {_where(expanded(place).absolute())}")
        if one.name in found:
            rule = f"must hold models of different names: {one.name} comes twice"
            raise ConfigError("evaluate.models", rule, got=run.evaluate.models)
        found[one.name] = one
    if run.model.path is not None and not any(one.on_given_base for one in found.values()):
        rule = "is the base of adapters in evaluate.models that no run of ours wrote, and there is none"
        raise ConfigError("model.path", rule, got=run.model.path, fix="Leave it out, or name it in evaluate.models.")
    return list(found.values())


def _where(place: Path) -> str:
    """The folder that distinguishes a model from others of the same name: the run's folder, or the parent of a model's."""
    run = place.parent if place.name == FINAL else place
    return run.name if _is_run(place) else place.parent.name


def _is_run(folder: Path) -> bool:
    return any((place / "run.yaml").is_file() for place in (folder, *([folder.parent] if folder.name == FINAL else [])))


def _entry(run: EvaluateRun, place: str) -> _Asked:
    folder = expanded(place)
    if _is_run(folder):
        trained = read_trained(place, "evaluate.models")
        check_run_writes(trained, "evaluate.models")
        adapter = None if trained.adapter is None else str(trained.adapter)
        return _Asked(trained.name, trained.model, _rendering(run, trained), adapter)
    name, data = folder.absolute().name, _rendering(run, None)
    if (folder / "adapter_config.json").is_file():
        base = run.model if run.model.path is not None else _model(run, base_of(place, "evaluate.models"))
        return _Asked(name, base, data, str(folder.absolute()), on_given_base=run.model.path is not None)
    if (folder / "config.json").is_file():
        return _Asked(name, _model(run, str(folder.absolute())), data, None)
    if place.count("/") == 1 and not folder.exists():
        packaged.check(place, "evaluate.models")
        return _Asked(name, _model(run, place), data, None)
    rule = "must hold output folders of runs, folders with a model or an adapter, or models of a hub (owner/name)"
    raise ConfigError("evaluate.models", rule, got=place)


def _model(run: EvaluateRun, path: str) -> ModelConfig:
    """`found` with the settings of `model` that are not about its files."""
    of_files = {"revision": None, "tokenizer": None, "new_tokens": None, "resize_vocab": False, "merged_adapters": []}
    return replace(run.model, path=path, **of_files)


def _name_apart(bases: Sequence[tuple[Group, str]], names: Collection[str]) -> None:
    """A base with the name of another model is named after one of its adapters: `llama of my_run`."""
    taken = [*names, *(str(group.with_base) for group, _ in bases)]
    for group, adapter in bases:
        if taken.count(str(group.with_base)) > 1:
            group.with_base = f"{group.with_base} of {adapter}"
            while group.with_base in taken:
                group.with_base += " again"
            taken.append(group.with_base)


def rendering(data: DataConfig) -> dict[str, Any]:
    """The settings on which a conversation's prompt depends."""
    return {name: getattr(data, name) for name in RENDERS}


def written_alike(one: DataConfig, other: DataConfig) -> bool:
    """Whether both render conversations to the same prompts."""
    return rendering(one) == rendering(other)


def _rendering(run: EvaluateRun, trained: Trained | None) -> DataConfig:
    """The run's chat template settings, or the defaults, which use the model's own template."""
    if trained is None:
        plain = load_config("prepare", ["model=_base", "model.path=none", "data.path=none"]).data
        return replace(plain, template=run.evaluate.template)
    return replace(trained.run.data, template=run.evaluate.template or trained.run.data.template)
