"""Run benchmarks, keep what they print, and compare it with the newest committed result of a like machine.

    python -m benchmarks NAME ... [arguments]

Each benchmark is a file of this folder that prints one JSON object. The result goes to results/NAME-MACHINE-DATE.json, with a
number where that day has one of other arguments. Keys say by their unit which way is better: more is for `_per_s`, `mfu` and
`fill`, less for times (`_s`, `_ms`, `_us`) and memory (`_mib`, `_gib`); other keys are not compared. A loss of 5% or more is
shown, as is a figure that there is no more, and the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from importlib import metadata
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
LOSS = 0.05
HELP = "--help"
MORE_IS_BETTER = ("_per_s", "mfu", "fill")
LESS_IS_BETTER = ("_s", "_ms", "_us", "_mib", "_gib")
PACKAGES = ("raytune-llm", "torch", "transformers", "ray", "peft", "deepspeed", "tokenizers", "pyarrow", "numpy")


def main(argv: Sequence[str]) -> int:
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    arguments = list(argv[len(names) :])
    known = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
    asks_for_help = HELP in arguments or "-h" in arguments
    usage = f"usage: scripts/bench NAME ... [arguments]\nbenchmarks: {', '.join(known)}"
    if asks_for_help and not names:
        print(usage)
        return 0
    if not names or not set(names) <= set(known):
        print(usage, file=sys.stderr)
        return 2
    if asks_for_help:
        return max(subprocess.run([sys.executable, FOLDER / f"{name}.py", HELP]).returncode for name in names)
    machine = this_machine()
    losses = [loss for name in names for loss in run(name, arguments, machine)]
    for loss in losses:
        print(f"LOSS {loss}", file=sys.stderr)
    return 1 if losses else 0


def run(name: str, arguments: list[str], machine: Mapping[str, Any]) -> list[str]:
    """Run one benchmark and write its result. What is worse than before."""
    print(f"== {name}", file=sys.stderr)
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    result = {
        "benchmark": name,
        "arguments": arguments,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions()},
        "results": json.loads(done.stdout),
    }
    path = path_for(f"{name}-{machine_class(machine)}-{result['date']}", arguments)
    before = newest_committed(name, machine, arguments)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(done.stdout.rstrip(), f"-> {path.relative_to(FOLDER.parent)}", sep="\n")
    return [] if before is None else [f"{name} {line}" for line in worse(before["results"], result["results"])]


def path_for(stem: str, arguments: list[str]) -> Path:
    """Where a result goes: it replaces one of the same arguments and day, not one of others."""
    paths = (RESULTS / f"{stem}{number}.json" for number in chain([""], (f"-{number}" for number in count(2))))
    return next(path for path in paths if not path.exists() or json.loads(path.read_text())["arguments"] == arguments)


def this_machine() -> dict[str, Any]:
    import torch

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "bytecode_of_torch": _has_bytecode("torch"),
        "memory_gib": round(memory_gib),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())],
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine_class(machine: Mapping[str, Any]) -> str:
    """What must be alike for results to be compared, as part of a file name: `8x-nvidia-h200` or `intel-xeon-2-cores`."""
    gpus = machine["gpus"]
    text = f"{len(gpus)}x {gpus[0]}" if gpus else f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*ghz|\bcpu\b|\bprocessor\b", "", text.lower())).strip("-")


def _has_bytecode(package: str) -> bool:
    """Without, each process compiles the package's modules as it starts, unless it may keep them: starts take twice as long."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None and Path(importlib.util.cache_from_source(spec.origin)).exists()


def versions() -> dict[str, str]:
    installed = {str(found.metadata["Name"]).lower(): found.version for found in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def newest_committed(name: str, machine: Mapping[str, Any], arguments: list[str]) -> dict[str, Any] | None:
    """As committed: a second run on one day replaces the file, not what it is compared with. Where there is no repository, as it
    lies in the folder."""
    stem = f"{name}-{machine_class(machine)}-"
    for path, text in sorted(results(), reverse=True):
        if Path(path).name.startswith(stem) and (result := json.loads(text()))["arguments"] == arguments:
            return result
    return None


def results() -> list[tuple[str, Callable[[], str]]]:
    """Each result's path, and how to read it."""
    folder = RESULTS.relative_to(FOLDER.parent)
    tracked = git("ls-tree", "--name-only", "HEAD", f"{folder}/")
    if tracked is None:
        return [(str(path), path.read_text) for path in RESULTS.glob("*.json")]
    return [(path, partial(lambda path: git("show", f"HEAD:{path}") or "", path)) for path in tracked.splitlines()]


def git(*arguments: str) -> str | None:
    """What git says; None where it is not there, or knows no repository here."""
    try:
        return subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each figure that lost, or is not there any more (its variant ran out of memory, say)."""
    new = dict(numbers(after))
    lines = []
    for key, old in numbers(before):
        if key in new and old and loss(key, old, new[key]) >= LOSS:
            lines.append(f"{key}: {old:g} -> {new[key]:g} ({new[key] / old - 1:+.0%})")
        elif key not in new and key.endswith((*MORE_IS_BETTER, *LESS_IS_BETTER)):
            lines.append(f"{key}: {old:g} -> none")
    return lines


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def loss(key: str, before: float, after: float) -> float:
    """How much worse, as a fraction of before; negative where it became better."""
    change = after / before - 1
    if key.endswith(MORE_IS_BETTER):
        return -change
    return change if key.endswith(LESS_IS_BETTER) else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
