"""`plan`: the choices, steps and memory of a run on one screen, before it is run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llm import api
from raytune_llm.byte_size import in_units
from raytune_llm.config.run import TrainRun
from raytune_llm.config.stage import StageConfig
from raytune_llm.data.kinds import KINDS
from raytune_llm.memory.model import Memory
from raytune_llm.runs.plan import Data, Plan, Verdict

SMALL = 0.001
"""Parts that are a smaller fraction of the total memory are dimmed."""
REFERENCES = {
    "precomputed": "{}, once for all rows before the first step",
    "online": "{}, in each step",
    "none": "none",
}
COMPILED = {True: "compiled", False: "not compiled", "auto": "compiled on GPUs"}
PARTS = {
    "weights": "model and adapter",
    "gradients": "of what is trained",
    "optimizer": "its state",
    "buffers": "gathered and converted weights",
    "activations": "kept for the backward pass",
    "logits": "of a chunk of trained tokens",
    "layer": "a layer's backward pass, after the logits'",
    "reference": "another model, or copies of what is trained",
    "known": "of frozen first layers, which are computed once a batch",
}


def main(run: TrainRun) -> int:
    planned = api.plan(run)
    console = Console()
    for table in (_choices(run, planned), _memory(planned.memory), _verdicts(planned)):
        console.print(table, highlight=False)
        console.print()
    for line in chain.from_iterable(map(_fix_lines, planned.misfits)):
        console.print(line, highlight=False, soft_wrap=True)
    if planned.data is None and not run.data.streaming:
        console.print(
            "Steps and tokens are known after [bold]prepare[/bold] with the same model and data settings.", highlight=False
        )
    return 0


def _choices(run: TrainRun, planned: Plan) -> Table:
    table = _plain()
    table.add_row("run", f"[bold]{escape(run.name)}[/bold]: {run.stage.name} of {escape(_model(run))}")
    table.add_row("data", f"{escape(str(run.data.path))}, at most {run.data.max_length:,} tokens a {_limited(run)}")
    for what, value in _data_rows(run, planned.data):
        table.add_row(what, value)
    parameters = planned.parameters
    table.add_row(
        "parameters",
        f"{_short(parameters.total)}, trained {_short(parameters.trained)} ({parameters.trained / parameters.total:.2%}), "
        f"adapter {run.adapter.option}; {in_units(planned.saved_bytes)} in final/",
    )
    table.add_row(
        "a step",
        f"{_times(run.train.global_batch_size, _sample(run))} = {_times(planned.world_size, 'worker')} x "
        f"{_times(run.train.micro_batch_size, _sample(run))} x {_times(planned.accumulation, 'micro-batch', 'micro-batches')}"
        f"{_rows_of_a_step(run, planned.data)}",
    )
    if run.stage.has_reference:
        table.add_row("reference", REFERENCES[run.stage.reference].format(escape(_reference(run.stage, run))))
    table.add_row(
        "computed",
        f"{run.strategy.option}, {run.train.precision}, activation checkpointing {run.train.activation_checkpointing}, "
        f"{COMPILED[run.train.compile]}",
    )
    table.add_row("learned", f"{run.optimizer.name}, lr {run.optimizer.lr:g}, schedule {run.schedule.name}")
    return table


def _data_rows(run: TrainRun, data: Data | None) -> list[tuple[str, str]]:
    if run.data.streaming:
        return [("", "tokenized while training"), ("steps", f"{run.train.max_steps:,}")]
    if data is None:
        return [("", "not prepared yet"), ("steps", _times(run.train.epochs, "epoch") + _at_most(run))]
    packs = "" if data.fill is None else f" in {_times(data.samples, 'pack')}, {data.fill:.1%} full"
    return [
        ("", f"{_times(data.rows, 'row')}{packs}; {data.held_out_rows:,} held out"),
        ("tokens", f"{data.tokens:,} an epoch, {data.trained_tokens / data.tokens:.1%} of them trained"),
        ("steps", f"{data.total_steps:,} ({_times(run.train.epochs, 'epoch')} of {data.steps_per_epoch:,}{_at_most(run)})"),
    ]


def _at_most(run: TrainRun) -> str:
    return "" if run.train.max_steps is None else f", at most {run.train.max_steps:,} steps"


def _rows_of_a_step(run: TrainRun, data: Data | None) -> str:
    return "" if data is None or not run.data.packing else f", about {data.rows / data.steps_per_epoch:.3g} rows"


def _reference(stage: StageConfig, run: TrainRun) -> str:
    """The model that gives the reference log-probabilities."""
    if stage.reference_model is None and stage.reference_adapter is None:
        continues = run.adapter.path is not None
        return f"the model at the start of the run{', with the adapter that it continues' if continues else ''}"
    adapter = "" if stage.reference_adapter is None else f" with {stage.reference_adapter}"
    return f"{stage.reference_model or _model(run)}{adapter}"


def _memory(memory: Memory) -> Table:
    table = _plain("memory of one worker at its peak, estimated")
    for part, what in PARTS.items():
        size = getattr(memory, part)
        table.add_row(part, f"{in_units(size, 2):>11}", what, style="" if size >= SMALL * memory.total else "dim")
    table.add_row("together", f"{in_units(memory.total, 2):>11}", style="bold")
    return table


def _verdicts(planned: Plan) -> Table:
    table = _plain("where it fits")
    for verdict in planned.verdicts:
        device = verdict.device
        answer = "[green]yes[/green]" if verdict.fits else "[red]no[/red]"
        share = f"{device.share(verdict.memory, planned.world_size):.0%} of it"
        recomputed = "" if verdict.checkpointing == "none" else f", activation checkpointing {verdict.checkpointing}"
        table.add_row(escape(device.name), f"{in_units(device.memory, 0):>8}", f"{answer}, {share}{recomputed}")
    return table


def _fix_lines(misfit: Verdict) -> Iterator[str]:
    place = f"{escape(misfit.device.name)} ({in_units(misfit.device.memory, 0)})"
    if not misfit.fixes:
        yield f"{place} would be too small even with every change that plan tries."
        return
    yield f"{place} would do with"
    for fix in misfit.fixes:
        yield f"  {' '.join(fix.settings)}  [dim]{in_units(fix.memory.total)} a worker[/dim]"


def _plain(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))


def _model(run: TrainRun) -> str:
    name = run.model.path or run.model.config["model_type"]
    return f"{name}, random weights" if run.model.weights == "random" else name


def _limited(run: TrainRun) -> str:
    """What data.max_length limits."""
    return "side of a pair" if KINDS[run.stage.kind].sides == 2 else _sample(run)


def _sample(run: TrainRun) -> str:
    return "pack" if run.data.packing else "row"


def _times(count: float, one: str, many: str | None = None) -> str:
    count = int(count) if count == int(count) else count
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
