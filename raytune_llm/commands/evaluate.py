"""`evaluate`: benchmarks, and their results as a table."""

from __future__ import annotations

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raytune_llm import api
from raytune_llm.config.run import EvaluateRun


def main(run: EvaluateRun) -> int:
    console = Console()
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=None)
        evaluated = api.evaluate(run, on_progress=lambda done, total: progress.update(bar, completed=done, total=total))
    console.print(Markdown((evaluated.folder / "results.md").read_text()))
    if evaluated.found:
        console.print("These results were there before: the same was asked of the same models.", highlight=False)
        return 0
    console.print(f"Written: {evaluated.folder}/results.json, results.md and results.png", highlight=False, soft_wrap=True)
    return 0
