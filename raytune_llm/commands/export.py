"""`export`: a merged model, and how far its outputs are from those of the base with its adapter."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from raytune_llm import api
from raytune_llm.byte_size import in_units
from raytune_llm.config.export import CALIBRATED
from raytune_llm.config.run import ExportRun


def main(run: ExportRun) -> int:
    console = Console(highlight=False, soft_wrap=True)
    if run.export.format in CALIBRATED:
        what = f"llmcompressor computes {run.export.format} on {run.export.calibration_rows} rows, a layer at a time"
        console.print(f"{what}: minutes for a small model, hours for a large one")
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("writing", total=None)
        exported = api.export(run, on_progress=lambda done, total: progress.update(bar, completed=done, total=total))
    where = "was there before, of the same files and settings:" if exported.found else "written to"
    console.print(f"{in_units(exported.num_bytes)} {where} {exported.place}")
    if exported.difference is not None:
        console.print(f"Compared with the base and its adapter {exported.difference.said()}.")
    elif exported.unchecked is not None:
        console.print(f"Not compared with the base and its adapter: {exported.unchecked}.")
    if exported.notes:
        console.print(exported.notes, markup=False)
    if exported.commit is not None:
        console.print(f"Uploaded: {exported.commit}")
    return 0
