"""What a run reports while it is running, in addition to its records. Imports nothing heavy, so that it can be used anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytune_llm.report.metrics import Summary


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The run is about to train its first step, or resumes."""

    total_steps: int
    first_step: int
    """The step of the checkpoint that the run resumes from, or 0."""
    choices: tuple[str, ...]
    """Lines of text on settings that were chosen automatically, and why."""


class EndOfRun(Exception):
    """A sink raises it to end the run where it is."""


@dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """Progress of computing reference log-probabilities, in rows."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A line of text for the user, such as a slow task, what the run waits for, or a lost worker."""

    text: str
    ranks: tuple[int, ...] = ()
    """Ranks of the workers that it is about; empty: it is about the run."""


Update = RunStarted | ReferencePass | Notice


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """A line of samples.jsonl. Texts have no special tokens and no white space at their ends."""

    step: int
    source: str
    """Name of the row's data source; empty if there is only one."""
    row: int
    """Index of the row in the token store of held-out rows."""
    prompt: str
    answer: str
    reference: str

    def to_json(self) -> Mapping[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The result of a run, as shown on the terminal."""

    summary: Summary
    output_dir: str
    already_done: bool
    """The output folder already had the finished run, and nothing was computed."""
    held_out: Sequence[Sequence[str]]
    """(name, text of the figures) of the last evaluation."""
    answers: Sequence[Mapping[str, str | bool]]
    """Held-out rows: asked, expected, answers before and after training, and whether the last is right."""
    profile: str | None
    """The table of train.profile, and the path of the trace."""
    next_commands: Sequence[str]
