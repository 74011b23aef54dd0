"""`prepare`: writes raw rows to a token store, and shows how many were kept, shortened or dropped."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from raytune_llm import api
from raytune_llm.config.run import PrepareRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import Place
from raytune_llm.data.pipeline import Prepared
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import Store
from raytune_llm.report.plots import save
from raytune_llm.runs.tokenizer import tokenizer_of

PERCENTILES = (50, 90, 99, 100)


def main(run: PrepareRun) -> int:
    console = Console()
    prepared = prepare_with_progress(run, console)
    tokenizer, _ = tokenizer_of(run)
    shares = shares_prompts(run, run.stage.kind, tokenizer)
    for title, store in (("train", prepared.store), ("eval", prepared.eval_store)):
        if store is not None:
            console.print(_summary(title, store, run.data.max_length, share_prompts=shares))
            if not (picture := store.folder / "lengths.png").exists():
                plot_lengths(store, picture)
    for row in range(min(run.look, len(prepared.store))):
        console.print(Panel(shown(prepared.store, row, tokenizer), title=f"row {row + 1}", title_align="left"))
    if prepared.reused:
        console.print("Nothing to do: the store exists.")
    else:
        console.print(f"{prepared.rows_per_s:.0f} rows/s; {prepared.seconds:.1f} s in all", highlight=False)
    without = ", and without look," if run.look else ""
    console.print(f"Next: the same command with train in place of prepare{without} trains on this store.", soft_wrap=True)
    return 0


def shares_prompts(run: PrepareRun, kind: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether packs hold one copy of a prompt for both of its answers."""
    if not KINDS[kind].can_share_prompts and run.data.share_prompts is not True:
        return False
    # Seconds to import, and only rows of two answers need them.
    from raytune_llm.models.build import run_config
    from raytune_llm.runs.stores import shares_prompts

    return shares_prompts(run, kind, lambda: run_config(run.model, tokenizer, run.data.max_length))


def prepare_with_progress(run: PrepareRun, console: Console) -> Prepared:
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("preparing", total=None)
        return api.prepare(run, on_progress=lambda done, total: progress.update(bar, completed=done, total=total))


def shown(store: Store, row: int, tokenizer: PreTrainedTokenizerFast) -> Text:
    """The row's documents one below the other: trained text in green, the rest dim."""
    text = Text()
    length = int(store.lengths[row])
    documents = store.kind.documents(store, Place(row, row, 0, length), max_length=length, share_prompts=False)
    for number, document in enumerate(documents[: store.kind.sides]):
        text.append("\n" if number else "")
        edges = [0, *document.spans.tolist(), len(document.ids)]
        for place, (start, end) in enumerate(pairwise(edges)):
            text.append(str(tokenizer.decode(document.ids[start:end])), style="green" if place % 2 else "dim")
    return text


def plot_lengths(store: Store, path: Path) -> None:
    """A histogram of the rows' lengths in tokens."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(6, 3), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.hist(store.lengths, bins=50)
    axes.locator_params(axis="y", integer=True)
    axes.set(xlabel="tokens", ylabel="rows", title=f"{len(store):,} rows, {store.num_tokens:,} tokens")
    save(figure, path)


def _summary(title: str, store: Store, max_length: int, *, share_prompts: bool) -> Table:
    lengths = store.lengths
    samples = Samples(store, np.arange(len(store)), max_length=max_length, packing=True, share_prompts=share_prompts)
    num_packs, capacity = len(samples), samples.capacity
    num_tokens = int(samples.tokens.sum())
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest").tolist()
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("rows", f"{store.num_rows:,}")
    table.add_row("tokens", f"{store.num_tokens:,}")
    table.add_row("trained", f"{store.num_trained_tokens / store.num_tokens:.1%} of the tokens")
    table.add_row("lengths", ", ".join(f"{value:,} at {share}%" for share, value in zip(PERCENTILES, percentiles, strict=True)))
    table.add_row("packs", f"{num_packs:,} of {capacity:,} tokens, {num_tokens / (num_packs * capacity):.1%} full")
    for title, counted in (("shortened", store.shortened), ("dropped", store.dropped)):
        for reason, count in sorted(counted.counts.items(), key=lambda item: -item[1]):
            # Text, because a row's content may look like markup.
            table.add_row(title, Text(f"{count:,}: {reason}\n" + "\n".join(counted.examples[reason])))
    for remark in store.kind.remarks(store):
        name, _, said = remark.partition(": ")
        table.add_row(name, said)
    table.add_row("store", Text(str(store.folder)))
    return table
