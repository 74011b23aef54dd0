"""Prints names and values in two columns as plain lines. A table would break paths that are longer than the terminal, so that
they could not be copied."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print (name, value) facts. Values may contain rich's markup."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
