"""Writes a model's config.json, or an adapter's adapter_config.json, in the same form as transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MODEL_CONFIG = "config.json"


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def change_config(path: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace the file's values by change(values). Nothing happens if the file does not exist."""
    if path.exists():
        write_config(path, change(json.loads(path.read_text())))
