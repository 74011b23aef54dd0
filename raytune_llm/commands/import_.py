"""`import`: translates a LLaMA-Factory file to an experiment, and shows what became of each argument."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llm.config.run import ImportRun
from raytune_llm.migrate.experiment import declaration_elsewhere, experiment_name, translate_file, write
from raytune_llm.migrate.translation import Translation

STYLES = {"mapped": "", "no effect": "dim", "refused": "red"}


def main(run: ImportRun) -> int:
    console = Console()
    translation = translate_file(run)
    path = write(run, translation)  # before the table, which would look like success if this failed
    console.print(_table(translation), highlight=False)
    console.print(f"\nWrote {escape(str(path))}, with LLaMA-Factory's defaults for what the file does not set.", highlight=False)
    if not_found := declaration_elsewhere(translation):
        console.print(f"{escape(not_found)} does not exist, so the data sets were not checked.", style="yellow", highlight=False)
    command = f"python -m raytune_llm --config-dir {shlex.quote(run.config_dir)} +experiment={experiment_name(run)}"
    console.print(f"Next: [bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)
    return 0


def _table(translation: Translation) -> Table:
    """One row for each outcome, with all arguments that led to it."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for kind, style in STYLES.items():
        rows: dict[str, list[str]] = {}
        for outcome in translation.of(kind):
            rows.setdefault(outcome.text, []).append(f"{outcome.argument}: {outcome.value}")
        for text, arguments in rows.items():
            table.add_row(kind, escape("\n".join(arguments)), escape(text), style=style)
    return table
