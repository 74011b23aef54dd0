"""`prepare`: raw rows to a token store, and what became of them."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raytune_llm.config.run import PrepareRun
from raytune_llm.data.packing import plan
from raytune_llm.data.pipeline import Prepared, prepare
from raytune_llm.data.store import Store

PERCENTILES = (50, 90, 99, 100)


def main(run: PrepareRun) -> int:
    console = Console()
    prepared = prepare_with_progress(run, console)
    console.print(_summary("train", prepared.store, run.data.max_length))
    if prepared.eval_store is not None:
        console.print(_summary("eval", prepared.eval_store, run.data.max_length))
    if prepared.reused:
        console.print("Nothing to do: the store was there.")
    else:
        console.print(f"{prepared.rows_per_s:.0f} rows/s; {prepared.seconds:.1f} s in all", highlight=False)
    console.print("Next: `python -m raytune_llm train` with the same model and data settings takes this store as it is.")
    return 0


def prepare_with_progress(run: PrepareRun, console: Console) -> Prepared:
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("preparing", total=None)
        return prepare(
            run.model,
            run.data,
            run.resources,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _summary(title: str, store: Store, max_length: int) -> Table:
    lengths = store.lengths
    num_packs = len(plan(lengths, max_length))
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest").tolist()
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("rows", f"{store.num_rows:,}")
    table.add_row("tokens", f"{store.num_tokens:,}")
    table.add_row("trained", f"{store.num_trained_tokens / store.num_tokens:.1%} of the tokens")
    table.add_row("lengths", ", ".join(f"{value:,} at {share}%" for share, value in zip(PERCENTILES, percentiles, strict=True)))
    table.add_row("packs", f"{num_packs:,} of {max_length:,} tokens, {store.num_tokens / (num_packs * max_length):.1%} full")
    for reason, count in sorted(store.dropped.counts.items(), key=lambda item: -item[1]):
        table.add_row("dropped", f"{count:,}: {reason}\n" + "\n".join(store.dropped.examples[reason]))
    table.add_row("store", str(store.folder))
    return table
