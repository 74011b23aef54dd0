"""The files of a saved adapter, as PEFT names them."""

from __future__ import annotations

from pathlib import Path

from raytune_llm.errors import ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_files(path: str | Path, setting: str) -> None:
    """Raises ConfigError, which names the setting, if the folder lacks the config or the weights."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        fix = "Train that adapter first, or name another folder."
        raise ConfigError(setting, f"must be a folder with {CONFIG}", got=str(path), fix=fix)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigError(setting, f"must be a folder with {WEIGHTS[0]}", got=str(path), fix="Copy the whole folder.")
