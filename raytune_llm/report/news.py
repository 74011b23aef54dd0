"""What a run reports while it is running, beside its records. Imports nothing heavy, so that listeners stay light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_llm.report.metrics import Summary


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What a run knows of itself when its first step is about to come."""

    total_steps: int
    first_step: int
    """The step of the checkpoint that it resumes from, or 0."""
    choices: tuple[str, ...]
    """What was chosen for it and why, a line each."""


class EndOfRun(Exception):
    """Raised by a sink: the run is to end where it is."""


@dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """How far log-probabilities under the reference are computed, in rows."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line for the user: what takes long, what a run waits for, what became of a worker."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """A line of samples.jsonl. Texts are without special tokens and outer white space."""

    step: int
    source: str
    """The source of the row where there are several."""
    row: int
    """In the store of what is held out."""
    prompt: str
    answer: str
    reference: str

    def to_json(self) -> Mapping[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a run came to, as the terminal shows it."""

    summary: Summary
    output_dir: str
    already_done: bool
    """The output folder held the finished run; nothing was computed."""
    held_out: Sequence[Sequence[str]]
    """Names and figures of the last evaluation."""
    answers: Sequence[Mapping[str, str | bool]]
    """To held-out rows: asked, expected, before and after training, and whether the last is right."""
    profile: str | None
    """The table of a step by kind of work, and where its trace is."""
    next_commands: Sequence[str]
