"""`chain`: several commands, one after another."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rich.console import Console
from rich.markup import escape

from raytune_llm import api
from raytune_llm.config.run import ChainRun


def main(run: ChainRun) -> int:
    console = Console(highlight=False, soft_wrap=True)
    names = list(run.steps)

    def shown(name: str, verb: str, step: Any) -> None:
        number = f"step {names.index(name) + 1} of {len(names)}"
        console.print(f"[bold]{escape(name)}[/bold] ({number}): {escape(' '.join(run.words(name)))}")
        code = import_module(f"raytune_llm.commands.{verb}").main(step)
        assert code == 0, (name, code)  # a run that fails raises an error

    api.chain(run, each=shown)
    return 0
