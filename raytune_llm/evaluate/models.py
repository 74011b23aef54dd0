"""The models of an evaluation: those of one base are answered by one engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raytune_llm.config.data import DataConfig
from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.load import load_config
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.run import EvaluateRun
from raytune_llm.config.serve import ServedModels
from raytune_llm.errors import ConfigError
from raytune_llm.predict.models import check_writes, served_with
from raytune_llm.runs.trained import Trained, read_trained
from raytune_llm.serve.engines import lone_adapter


@dataclass
class Group:
    """Models on one engine. An adapter that no engine holds beside others has one of its own."""

    model: ModelConfig
    data: DataConfig
    """Of it, the settings of the chat template are used."""
    adapters: dict[str, str]
    with_base: str | None
    """The name by which the model itself is evaluated."""
    of_adapters: bool = False
    """More adapters can be added."""

    @property
    def names(self) -> list[tuple[str, str | None]]:
        """What a result is called, and the adapter that makes it."""
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


def groups_of(run: EvaluateRun) -> list[Group]:
    """Raises ConfigError for what is no run, writes no text, or has the name of another one."""
    settings = run.evaluate
    if not settings.models:
        name = Path(str(run.model.path or "model")).name
        return [Group(run.model, _rendering(run, None), {}, name)]
    groups: list[Group] = []
    names: set[str] = set()
    for place in settings.models:
        trained = read_trained(place, "evaluate.models")
        if trained.name in names:
            rule = f"must hold runs of different names: {trained.name} comes twice"
            raise ConfigError("evaluate.models", rule, got=settings.models)
        names.add(trained.name)
        if trained.adapter is None:
            groups.append(Group(trained.model, _rendering(run, trained), {}, trained.name))
            continue
        check_writes(str(trained.adapter), "evaluate.models")
        data = _rendering(run, trained)
        alike = [one for one in groups if one.of_adapters and one.model == trained.model and written_alike(one.data, data)]
        if settings.base and not alike:
            alike.append(Group(trained.model, data, {}, Path(str(trained.model.path)).name, of_adapters=True))
            groups.append(alike[0])
        own = Group(trained.model, data, {trained.name: str(trained.adapter)}, None, of_adapters=True)
        if lone_adapter(own.served(settings), run.engine) is not None:
            groups.append(replace(own, of_adapters=False))
        elif alike:
            alike[0].adapters[trained.name] = str(trained.adapter)
        else:
            groups.append(own)
    return groups


def written_alike(one: DataConfig, other: DataConfig) -> bool:
    return (one.template, one.default_system) == (other.template, other.default_system)


def _rendering(run: EvaluateRun, trained: Trained | None) -> DataConfig:
    """Settings of the chat template: the run's, or those of a run of the model's own template."""
    if trained is None:
        plain = load_config("prepare", ["model=_base", "model.path=none", "data.path=none"]).data
        return replace(plain, template=run.evaluate.template)
    return replace(trained.run.data, template=run.evaluate.template or trained.run.data.template)
