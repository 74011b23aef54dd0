"""What can become of an argument of another trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
"""Values by dotted path. The name of a group alone chooses its option: {"schedule": "cosine", "schedule.floor": 0.1}."""


@dataclass(frozen=True)
class Becomes:
    """One setting."""

    default: Any
    """The other trainer's, as are all defaults here."""
    setting: str
    read: Callable[[Any], Any] = lambda value: value
    """Raises Refusal for a value that has no equal here."""


@dataclass(frozen=True)
class NoEffect:
    """Nothing: the run is the same without it."""

    why: str


@dataclass(frozen=True)
class Joined:
    """Settings that follow from several arguments. A rule is called with the arguments that its parameters are named after."""

    default: Any
    rule: Callable[..., Settings | NoEffect]


@dataclass(frozen=True)
class Refused:
    """A refusal, unless the value is the default or says that the thing is not wanted (false or null)."""

    default: Any
    why: str


@dataclass(frozen=True)
class PartOf:
    """A detail of another argument, which is refused where that one is on, and not read where it is off."""

    switch: str
    on: Any = None
    """The value that is on; null: any but false and null."""


ArgumentRule = Becomes | Joined | NoEffect | Refused | PartOf


class Refusal(Exception):
    """This value of this argument can't be taken over. Raised by rules; all of a file are shown together."""

    def __init__(self, why: str, argument: str | None = None) -> None:
        super().__init__(why, argument)
        self.why, self.argument = why, argument
        """None: the one that is being read."""
