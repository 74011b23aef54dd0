"""Names and values in two columns, as plain lines: a table cuts a path that is longer than its terminal, which then can't be
pasted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Values may have rich's markup."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
