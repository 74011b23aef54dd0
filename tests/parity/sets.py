"""Sets of expected values: the full ones where they lie beside the checkout, else the few cases of each that are kept here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL = Path(__file__).resolve().parents[3] / "shared" / "parity"
KEPT = Path(__file__).parent / "fixtures"


def folder(name: str) -> Path:
    """`losses` or `llamafactory`."""
    return FULL / name if (FULL / name).is_dir() else KEPT / name


def oracle(name: str) -> dict[str, Any]:
    """Inputs and cases of losses, steps, optimizers or schedules."""
    return json.loads((folder("losses") / f"{name}.json").read_text(encoding="utf-8"))


def recorded(name: str) -> Iterator[dict[str, Any]]:
    """What LLaMA-Factory gave."""
    yield from map(json.loads, (folder("llamafactory") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
