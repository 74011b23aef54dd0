"""Shows the progress of a run on the terminal: rows while data is prepared, then steps while the model trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llm.report.facts import print_facts
from raytune_llm.report.progress_bar import ProgressBar
from raytune_llm.report.updates import Notice, ReferencePass, RunFinished, RunStarted, SampledAnswer, Update

SHOWN_SAMPLES = 3
SHOWN_CHARS = 300
"""Maximum characters shown of each text of a sample; samples.jsonl has the full text."""
REFERENCE_EVERY_S = 10.0


class Display:
    """Prints the progress of one run to a console. `EventLog` has the same methods."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: ProgressBar | None = None
        self._rows_shown = False
        self._reference_at = 0.0

    def run(self, name: str, text: str, settings: str) -> None:
        """`settings`: the full config as YAML, which is not shown here."""
        self._console.print(f"[bold]{escape(name)}[/bold]: {escape(text)}", highlight=False, soft_wrap=True)

    def rows(self, done: int, total: int) -> None:
        if not self._rows_shown and done >= total:
            self._rows_shown = True
            self._console.print(f"prepared {total:,} rows", highlight=False)

    def update(self, update: Update) -> None:
        match update:
            case Notice():
                self._dim(update.text)
            case ReferencePass():
                self._reference(update)
            case RunStarted():
                self._started(update)

    def _started(self, run: RunStarted) -> None:
        self.close()
        if run.first_step:
            self._console.print(f"resuming from the checkpoint at step {run.first_step}", highlight=False)
        for choice in run.choices:
            self._dim(choice)
        self._bar = ProgressBar(run.total_steps, first_step=run.first_step, console=self._console)

    def _reference(self, reference: ReferencePass) -> None:
        """One line every REFERENCE_EVERY_S seconds, which also works in a log file."""
        now = time.monotonic()
        if reference.done == 0 or now - self._reference_at >= REFERENCE_EVERY_S:
            self._reference_at = now
            self._dim(f"reference log-probabilities: {reference.done:,} of {reference.total:,} rows")

    def _dim(self, text: str) -> None:
        self._console.print(escape(text), style="dim", highlight=False, soft_wrap=True)

    def record(self, record: Mapping[str, Any], left_s: float | None = None) -> None:
        if self._bar is not None:
            self._bar.update(record, left_s)

    def samples(self, samples: Sequence[SampledAnswer]) -> None:
        for sample in samples[:SHOWN_SAMPLES]:
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
            table.add_row("asked", escape(_shortened(last_line(sample.prompt))), style="dim")
            table.add_row("expected", escape(_shortened(sample.reference)), style="dim")
            table.add_row(f"step {sample.step}", escape(_shortened(sample.answer)))
            self._console.print(table, highlight=False)

    def done(self, done: RunFinished) -> None:
        if done.already_done:
            said = f"{done.output_dir} holds this run, finished. Nothing to do (resume=never starts again)."
            self._console.print(escape(said), highlight=False, soft_wrap=True)
        print_facts(self._console, _figures(done))
        if done.profile is not None:
            self._console.print(f"\n{done.profile}", highlight=False)
        for answer in done.answers:
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
            table.add_row("asked", escape(str(answer["asked"])))
            table.add_row("expected", escape(str(answer["expected"])))
            table.add_row("before", escape(str(answer["before"])), style="dim")
            table.add_row("after", escape(str(answer["after"])), style="green" if answer["right"] else "red")
            self._console.print()
            self._console.print(table, highlight=False)
        for begin, command in zip(["\nNext: ", *["      "] * len(done.next_commands)], done.next_commands, strict=False):
            self._console.print(f"{begin}[bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        sys.stdout.flush()


def _figures(done: RunFinished) -> list[tuple[str, str]]:
    summary = done.summary
    facts: list[tuple[str, str]] = []
    if summary.loss_first is not None and summary.loss_last is not None:
        facts.append(("loss", f"{summary.loss_first:.4f} -> {summary.loss_last:.4f}"))
    facts += [(name, figures) for name, figures in done.held_out]
    if summary.exact_match_before is not None and summary.exact_match_after is not None:
        exact = f"{summary.exact_match_before:.1%} -> [bold]{summary.exact_match_after:.1%}[/bold]"
        facts.append(("exact match, held out", exact))
    rate = "" if summary.tokens_per_s is None else f", {summary.tokens_per_s:,.0f} tokens/s"
    mfu = "" if summary.mfu is None else f", mfu {summary.mfu:.1%}"
    facts.append(("trained", f"{summary.steps:,} steps, {summary.tokens:,} tokens{rate}{mfu}"))
    wall = summary.wall_s
    phases = {"start": wall.start, "prepare": wall.prepare, "load": wall.load, "train": wall.train, "save": wall.save}
    phases |= {"evaluate": wall.evaluate} if summary.exact_match_after is not None else {}
    facts.append(("time", f"{wall.total:.0f} s ({', '.join(f'{name} {seconds:.0f}' for name, seconds in phases.items())})"))
    facts.append(("model", escape(str(Path(done.output_dir) / "final"))))
    facts.append(("curve", escape(str(Path(done.output_dir) / "loss.png"))))
    return facts


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS].rstrip()} ..."


def last_line(prompt: str) -> str:
    """The last line of a rendered prompt, without the line that names the assistant as the next speaker."""
    lines = prompt.splitlines()
    return lines[-2] if len(lines) > 1 else prompt
