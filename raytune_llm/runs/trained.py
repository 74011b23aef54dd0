"""The result of a finished run: the model that it trained, or its base and adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raytune_llm.config.data import DataConfig
from raytune_llm.config.load import load_config
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.paths import expanded
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError

RENDERING = ("template", "default_system", "tool_format", "today")
"""Settings of `data` that determine how prompts are rendered; null: not set."""


@dataclass(frozen=True)
class Trained:
    run: TrainRun
    final: Path
    """The folder with the adapter or the model."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter; None if the model itself was trained."""
        return None if self.run.adapter.trains_base else self.final

    @property
    def model(self) -> ModelConfig:
        """The trained model, or the base of the adapter."""
        if self.run.adapter.trains_base:
            in_it = {"config": {}, "revision": None, "new_tokens": None, "resize_vocab": False, "merged_adapters": []}
            return replace(self.run.model, path=str(self.final), weights="pretrained", **in_it)
        return self.run.model

    def rendered(self, data: DataConfig) -> DataConfig:
        """`data` with the run's settings for those that it does not set, so that prompts are rendered as in training."""
        own = self.run.data
        open_ones = {name: getattr(own, name) for name in RENDERING if getattr(data, name) is None}
        thinking = own.enable_thinking if data.enable_thinking is True else data.enable_thinking
        return replace(data, **open_ones, enable_thinking=thinking)


def read_trained(folder: str, setting: str) -> Trained:
    """folder: an output folder or its final/. Raises ConfigError, naming the setting, if it has no finished run."""
    place = expanded(folder).absolute()
    if place.name == "final" and not (place / "run.yaml").is_file():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(setting, "must be the output folder of a run", got=folder, fix="There is no such folder.")
    if not (place / "run.yaml").is_file():
        fix = "Set model.path, and name an adapter by itself, for what no run of ours wrote."
        raise ConfigError(setting, "must be the output folder of a run, with its run.yaml", got=folder, fix=fix)
    final = place / "final"
    if not any((final / name).is_file() for name in ("adapter_config.json", "config.json")):
        fix = "Resume the run: it writes final/ at its end."
        raise ConfigError(setting, "must be the folder of a run that has ended, with its final/", got=folder, fix=fix)
    try:
        return Trained(load_config("train", config_dir=place, config_name="run"), final)
    except ConfigError as error:
        rule = f"must be the output folder of a run, with the run.yaml that it wrote ({error})"
        raise ConfigError(setting, rule, got=folder, fix="Restore that file, or name another run.") from error
