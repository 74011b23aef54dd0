"""`train`: the face of a run, from the progress line to the next command to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llm import api
from raytune_llm.__main__ import BEGAN
from raytune_llm.config.run import TrainRun
from raytune_llm.evaluate.exact_match import ExactMatch
from raytune_llm.report.display import SHOWN_SAMPLES, Display, last_line
from raytune_llm.report.metrics import METRICS, read_metrics
from raytune_llm.report.profile import TABLE, TRACE

HELD_OUT = {
    "eval_loss": ("loss, held out", "{:.4f}"),
    "eval_rewards/margins": ("margin, held out", "{:.3g}"),
    "eval_rewards/accuracies": ("better one right, held out", "{:.1%}"),
    "eval_accuracy": ("better one right, held out", "{:.1%}"),
}
"""What the summary tells of the last evaluation, and of one before the first step."""


def main(run: TrainRun) -> int:
    console = Console()
    console.print(
        f"[bold]{escape(run.name)}[/bold]: {run.stage.name} of {run.model.path or run.model.config.get('model_type')}, "
        f"adapter {run.adapter.name}, strategy {run.strategy.option}, resources {run.resources.name}",
        highlight=False,
    )
    bars = Display(console)
    try:
        result = api.train(
            run, sinks=[bars.record], on_begin=bars.begin, on_samples=bars.samples, on_progress=bars.rows, began=BEGAN
        )
    finally:
        bars.close()
    if result.already_done:
        console.print(f"{result.output_dir} holds this run, finished. Nothing to do (resume=never starts anew).")
    _print_summary(console, result)
    if run.train.profile and (seen := result.output_dir / TABLE).exists():
        console.print(
            f"\na step, by kind of work ({result.output_dir / TRACE} for a viewer)\n{seen.read_text()}", highlight=False
        )
    if result.before is not None and result.after is not None:
        _print_answers(console, result.before, result.after)
    if (command := next_command(run, result.final)) is not None:
        console.print(f"\nNext: [bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)
    return 0


def _print_summary(console: Console, result: api.TrainResult) -> None:
    summary = result.summary
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if summary.loss_first is not None and summary.loss_last is not None:
        table.add_row("loss", f"{summary.loss_first:.4f} -> {summary.loss_last:.4f}")
    path = result.output_dir / METRICS
    for name, figures in held_out_figures(read_metrics(path) if path.exists() else []):
        table.add_row(name, figures)
    if summary.exact_match_before is not None and summary.exact_match_after is not None:
        table.add_row(
            "exact match, held out", f"{summary.exact_match_before:.1%} -> [bold]{summary.exact_match_after:.1%}[/bold]"
        )
    rate = "" if summary.tokens_per_s is None else f", {summary.tokens_per_s:,.0f} tokens/s"
    mfu = "" if summary.mfu is None else f", mfu {summary.mfu:.1%}"
    table.add_row("trained", f"{summary.steps:,} steps, {summary.tokens:,} tokens{rate}{mfu}")
    wall = summary.wall_s
    table.add_row(
        "time",
        f"{wall.total:.0f} s (start {wall.start:.0f}, prepare {wall.prepare:.0f}, load {wall.load:.0f}, "
        f"train {wall.train:.0f}, save {wall.save:.0f})",
    )
    table.add_row("model", str(result.final))
    table.add_row("curve", str(result.output_dir / "loss.png"))
    console.print(table, highlight=False)


def held_out_figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and figures of the last evaluation, after those of one before the first step where there was one."""
    evaluations = [record for record in records if "eval_loss" in record]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    before = first if first["step"] == 0 and first is not last else {}
    if before.get("eval_rewards/margins") == 0:  # a policy that is its own reference prefers neither answer
        before = {name: value for name, value in before.items() if name != "eval_rewards/accuracies"}
    return [
        (title, " -> ".join(form.format(record[name]) for record in (before, last) if name in record))
        for name, (title, form) in HELD_OUT.items()
        if name in last
    ]


def _print_answers(console: Console, before: ExactMatch, after: ExactMatch) -> None:
    for old, new in list(zip(before.samples, after.samples, strict=True))[:SHOWN_SAMPLES]:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
        table.add_row("asked", escape(last_line(old.prompt)))
        table.add_row("expected", escape(new.reference))
        table.add_row("before", escape(old.answer), style="dim")
        table.add_row("after", escape(new.answer), style="green" if new.correct else "red")
        console.print()
        console.print(table, highlight=False)


def next_command(run: TrainRun, final: Path) -> str | None:
    """How to go on from what a run left. None where that is of no use as it is: a reward model, or one that can't chat yet."""
    if not run.stage.writes:
        return None
    there = f"output_dir={final.parent}_next"
    if run.adapter.trains_base or run.stage.plain_text:
        if not (final / "chat_template.jinja").exists():
            return None
        model = f"model.path={final}" if run.adapter.trains_base else f"model.path={run.model.path} adapter.path={final}"
        return f"python -m raytune_llm model=hub {model} data.path=MORE.jsonl {there}"
    return f"python -m raytune_llm --config-dir {final.parent} --config-name run adapter.path={final} {there}"
