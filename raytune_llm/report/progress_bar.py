"""The progress of training on the terminal: a progress bar, or plain lines if output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_EVERY_S = 10.0
LINE_EVERY_FRACTION = 0.1


class Pace:
    """Estimates the remaining time of a run from the steps since its first record. The time before that is warm-up."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._start: tuple[int, float] | None = None

    def left_s(self, step: int, now: float) -> float | None:
        """Estimated remaining seconds; None at the first record. now: seconds of any monotonic clock."""
        self._start = self._start or (step, now)
        first_step, first_time = self._start
        return (now - first_time) / (step - first_step) * (self.total_steps - step) if step > first_step else None


class ProgressBar:
    """Shows the records of a run (metrics.py); `update` is a sink."""

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """first_step: the step that the run resumes from."""
        self._clock, self._pace = clock, Pace(total_steps)
        self._shown: dict[str, Any] = {"step": first_step}
        console = console or Console()
        self._line = (
            _Bar(console, total_steps, first_step) if console.is_terminal else _Lines(console, total_steps, first_step, clock)
        )

    def update(self, record: Mapping[str, Any], left_s: float | None = None) -> None:
        """left_s: remaining seconds, if they were measured elsewhere when the record was made."""
        self._shown |= record
        measured = self._pace.left_s(record["step"], self._clock())
        self._line.show(record["step"], describe(self._shown, measured if left_s is None else left_s))

    def close(self) -> None:
        self._line.close()


def describe(record: Mapping[str, Any], left_s: float | None) -> str:
    """The main values of a record on one line: `loss 0.8123  eval 0.9031  412 tokens/s  0:02:03 left`."""
    parts = (
        ("loss", "loss {:.4f}"),
        ("rewards/accuracies", "accuracy {:.0%}"),
        ("accuracy", "accuracy {:.0%}"),
        ("rewards/margins", "margin {:.3g}"),
        ("eval_loss", "eval {:.4f}"),
        ("eval_rewards/accuracies", "eval accuracy {:.0%}"),
        ("eval_accuracy", "eval accuracy {:.0%}"),
        ("tokens_per_s", "{:,.0f} tokens/s"),
    )
    text = [form.format(record[name]) for name, form in parts if name in record]
    return "  ".join([*text, *([f"{timedelta(seconds=round(left_s))} left"] if left_s is not None else [])])


class _Bar:
    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, text="")
        self._progress.start()

    def show(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, text=text)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Prints a line at the first record, then every tenth of the run or every ten seconds, and at the last step."""

    def __init__(self, console: Console, total_steps: int, first_step: int, clock: Callable[[], float]) -> None:
        self._console, self._total, self._clock = console, total_steps, clock
        self._next_step, self._next_time = first_step, clock()

    def show(self, step: int, text: str) -> None:
        if step < min(self._next_step, self._total) and self._clock() < self._next_time:
            return
        self._next_step = step + max(1, round(self._total * LINE_EVERY_FRACTION))
        self._next_time = self._clock() + LINE_EVERY_S
        self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass
