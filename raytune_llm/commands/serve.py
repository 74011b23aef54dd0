"""`serve`: an OpenAI-compatible server of one model and many adapters."""

from __future__ import annotations

from rich.console import Console

from raytune_llm import api
from raytune_llm.config.run import ServeRun


def main(run: ServeRun) -> int:
    console = Console()
    api.serve(run, notify=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    return 0
