"""`predict`: answers for a data set, and their metrics as a table."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raytune_llm import api
from raytune_llm.config.run import PredictRun
from raytune_llm.predict.run import Predicted


def main(run: PredictRun) -> int:
    console = Console()
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=None)
        predicted = api.predict(run, on_progress=lambda done, total: progress.update(bar, completed=done, total=total))
    console.print(_metrics(predicted))
    if predicted.found:
        console.print(f"{predicted.found} answers were there before.", highlight=False)
    if predicted.generated_tokens:
        rate = predicted.generated_tokens / predicted.seconds
        console.print(
            f"{predicted.generated_tokens:,} new tokens in {predicted.seconds:.1f} s, {rate:,.0f} tokens/s", highlight=False
        )
    console.print(f"Written: {predicted.folder}/predictions.jsonl and metrics.json", highlight=False, soft_wrap=True)
    return 0


def _metrics(predicted: Predicted) -> Table:
    """One row for each metric, one column for each model."""
    table = Table("", *predicted.models, box=None, padding=(0, 2, 0, 0))
    names = dict.fromkeys(name for numbers in predicted.metrics.values() for name in numbers)
    for name in names:
        table.add_row(name, *(_shown(predicted.metrics[model].get(name)) for model in predicted.models))
    return table


def _shown(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
