"""`doctor`: this machine at a glance, then what is missing and how to get it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytune_llm import api
from raytune_llm.byte_size import in_units
from raytune_llm.config.run import DoctorRun
from raytune_llm.doctor import Doctor, Finding, Package


def main(run: DoctorRun) -> int:
    seen = api.doctor(run)
    console = Console()
    for table in (_machine(seen), _packages(seen.packages)):
        console.print(table, highlight=False)
        console.print()
    for finding in sorted(seen.findings, key=lambda finding: not finding.stops_training):
        console.print(_finding(finding), highlight=False, soft_wrap=True)
    verdict = "[green]Training can run here.[/green]" if seen.can_train else "[red]Training can't run here.[/red]"
    console.print(verdict, highlight=False)
    return 0 if seen.can_train else 1


def _machine(seen: Doctor) -> Table:
    table = _plain()
    table.add_row("machine", f"{seen.platform}, {seen.cpus} CPUs, {in_units(seen.memory, 0)}; Python {seen.python}")
    for gpu in seen.gpus:
        driver = "" if gpu.driver is None else f", driver {gpu.driver}"
        table.add_row("GPU", f"{escape(gpu.name)}, {in_units(gpu.memory, 0)}{driver}")
    if not seen.gpus:
        table.add_row("GPU", "none: small models train on the CPU")
    for reason, precisions in _attention(seen).items():
        table.add_row("attention", f"{', '.join(precisions)}: {reason}")
    table.add_row("cache", f"{escape(str(seen.cache))}, {in_units(seen.free_disk, 0)} free")
    table.add_row("hub", f"{seen.hub}: {seen.hub_state}")
    for model in seen.packaged_models:
        table.add_row("model", f"{model}, from its package")
    return table


def _attention(seen: Doctor) -> dict[str, list[str]]:
    """The precisions that each attention back end serves, with its reason."""
    choices: dict[str, list[str]] = {}
    for choice in seen.attention:
        choices.setdefault(f"{choice.backend} ({choice.reason})", []).append(choice.precision)
    return choices


def _packages(packages: tuple[Package, ...]) -> Table:
    """The installed packages. Missing ones are among the findings."""
    table = _plain()
    for package in sorted((package for package in packages if package.installed), key=lambda package: package.optional):
        mark = "[green]✓[/green]" if package.in_range else "[yellow]![/yellow]"
        feature = "" if package.feature is None else f"for {package.feature}"
        table.add_row(mark, package.name, package.installed, f"[dim]{package.supported}[/dim]", f"[dim]{feature}[/dim]")
    return table


def _finding(finding: Finding) -> str:
    mark = "[red]✗[/red]" if finding.stops_training else "[yellow]![/yellow]"
    return f"{mark} {escape(finding.what)}, which costs {escape(finding.costs)}. [dim]{escape(finding.fix)}[/dim]"


def _plain() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2, 0, 0))
