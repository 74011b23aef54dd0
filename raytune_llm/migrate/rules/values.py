"""Values of arguments that several rules read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from raytune_llm.migrate.argument_rules import Refusal

Find = Callable[[str], str | None]
LATER = "is not supported yet"


def whole_steps(steps: float) -> int:
    if steps < 1 or steps != int(steps):
        raise Refusal("fractions of the run are not supported; give a number of steps")
    return int(steps)


def whole_steps_of(steps: float, argument: str) -> int:
    """whole_steps, for a rule of several arguments: the refusal names this one."""
    try:
        return whole_steps(steps)
    except Refusal as refusal:
        raise Refusal(refusal.why, argument) from None


def listed(value: str | Sequence[Any], separator: str = ",") -> list[Any]:
    """LLaMA-Factory takes lists as lists or as one text with commas."""
    if not isinstance(value, str):
        return list(value)
    return [part.strip() for part in re.split(separator, value) if part.strip()]
