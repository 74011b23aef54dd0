"""`compare`: runs side by side, on the screen and as a page."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytune_llm.config.run import CompareRun
from raytune_llm.errors import ConfigError
from raytune_llm.runs.comparison import Comparison, Rows, compare

PAGE = b"<!doctype html"
"""The first bytes of a page that this command wrote."""
COLUMN_WIDTH = 60
"""Characters that each column may take in the HTML page."""


def main(run: CompareRun) -> int:
    comparison = compare(run.runs)
    page = None if run.page is None else Path(run.page)
    if page is not None:
        _check_page(page)
    _show(comparison, Console())
    if page is not None:
        recorded = Console(record=True, width=COLUMN_WIDTH * (1 + len(comparison.names)), file=StringIO())
        _show(comparison, recorded)
        page.write_text(recorded.export_html(), encoding="utf-8")
        print(f"Written: {page}")
    return 0


def _check_page(page: Path) -> None:
    """Raises ConfigError if the page can't be written, or if the file exists and is not such a page."""
    try:
        existed = page.exists()
        if page.is_file() and page.stat().st_size and page.read_bytes()[: len(PAGE)].lower() != PAGE:
            rule = "must be a new file, or a page that `compare` wrote and may replace: this file is not one"
            raise ConfigError("page", rule, got=str(page), fix="For example, page=runs.html.")
        page.open("a").close()
        if not existed:
            page.unlink()
    except OSError as error:
        raise ConfigError("page", f"must be a file that can be written ({error.strerror})", got=str(page)) from None


def _show(comparison: Comparison, console: Console) -> None:
    console.print(_table("settings that differ", comparison.names, comparison.settings))
    console.print(_table("figures", comparison.names, comparison.figures))
    for notice in comparison.notices:
        console.print(Text(notice), soft_wrap=True)  # unwrapped, so that a path can be copied
    for sample in comparison.samples:
        table = Table(title=Text(sample.prompt), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row("reference", Text(sample.reference))
        for name, answer in zip(comparison.names, sample.answers, strict=True):
            table.add_row(Text(name), Text(answer or ""))
        console.print(table)


def _table(title: str, names: Any, rows: Rows) -> Table:
    table = Table("", *map(escape, names), title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, values in rows.items():
        table.add_row(Text(name), *(Text(_shown(value)) for value in values))
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
