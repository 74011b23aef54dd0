"""The actor that holds the workers' messages until the driver reads them. It does not import torch, so it starts at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llm.errors import UserError
from raytune_llm.report.updates import SampledAnswer, Update
from raytune_llm.runs.faults import WorkersLost, WorkersNotStarted, WorkerStalled, WorkersWait
from raytune_llm.runs.outcome import TrainOutcome

Message = Mapping[str, Any] | Update | WorkersLost | WorkersNotStarted | WorkerStalled | WorkersWait | Sequence[SampledAnswer]
"""A record of metrics.jsonl, an update on the run, lost, stalled or waiting workers, or a list of samples."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The content of the inbox when the driver reads it."""

    messages: Sequence[Message]
    """Messages since the last reading."""
    error: UserError | None
    outcome: TrainOutcome | None
    hosts: Mapping[int, str]
    """Rank -> address of the worker's node."""
    silent_s: Mapping[int, float]
    """Rank -> seconds since the last heartbeat."""


class Inbox:
    """Its methods are called remotely: by the workers and by the driver."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._error: UserError | None = None
        self._outcome: TrainOutcome | None = None
        self._hosts: dict[int, str] = {}
        self._last_beat: dict[int, float] = {}
        self._asked_to_yield = False

    def join(self, rank: int, host: str) -> None:
        self._hosts[rank] = host
        self._last_beat[rank] = time.monotonic()

    def beat(self, rank: int) -> None:
        self._last_beat[rank] = time.monotonic()

    def leave(self, rank: int) -> None:
        self._last_beat.pop(rank, None)

    def ask_to_yield(self) -> None:
        """Ask the workers to save and end at their next log step."""
        self._asked_to_yield = True

    def asked_to_yield(self) -> bool:
        return self._asked_to_yield

    def fail(self, error: UserError) -> None:
        self._error = self._error or error

    def error(self) -> UserError | None:
        """The first error of a worker that the user has to fix."""
        return self._error

    def finish(self, outcome: TrainOutcome) -> None:
        self._outcome = outcome

    def put(self, message: Message) -> None:
        if isinstance(message, WorkersLost):
            self._last_beat.clear()
        self._messages.append(message)

    def take(self) -> Contents:
        messages, self._messages = self._messages, []
        now = time.monotonic()
        silent_s = {rank: now - at for rank, at in self._last_beat.items()}
        return Contents(messages=messages, error=self._error, outcome=self._outcome, hosts=self._hosts, silent_s=silent_s)
