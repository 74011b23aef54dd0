"""1,000,000 rows to tokens through one Ray node and through two: does a second node add what the first one does?

    sudo scripts/bench nodes [--rows 1000000]

The nodes are network namespaces of this machine with one CPU each, joined by a virtual cable, so it needs root and `ip`. Each
is a Ray node of its own with its own processes. They share the disk and the memory bus, as real nodes don't, and where the CPUs
are threads of one core, that core. Prints JSON: the steady rate through each, and how many times as fast two are (2 is linear).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memory import write_rows

NODES = {"raytune-a": "10.231.7.1", "raytune-b": "10.231.7.2"}
"""Namespaces and their addresses."""
LINK, PORT = "vray0", 6379


@contextmanager
def namespaces() -> Iterator[None]:
    """Both ends of the cable have one name, which Gloo and NCCL would be told."""
    first, second = NODES
    try:
        for name in NODES:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second)
        for name, address in NODES.items():
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                run("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def node(name: str, folder: Path, *, head: bool) -> Iterator[None]:
    """A Ray node of one CPU."""
    if head:
        place = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
    else:
        place = [f"--address={next(iter(NODES.values()))}:{PORT}"]
    settings = ["--num-cpus=1", f"--node-ip-address={NODES[name]}", "--disable-usage-stats"]
    run(*inside(name), ray(), "start", *place, *settings, env=environment())
    try:
        yield
    finally:
        pids = subprocess.run(["ip", "netns", "pids", name], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        subprocess.run(["kill", "-9", *pids], check=False)


def prepare(path: Path, cache: Path) -> dict[str, float]:
    first = next(iter(NODES))
    settings = ["model=smollm2_135m", f"data.path={path}", f"data.cache={cache}", "resources=cluster"]
    settings += [f"resources.address={NODES[first]}:{PORT}"]
    started = time.perf_counter()
    done = subprocess.run(
        [*inside(first), sys.executable, "-m", "raytune_llm", "prepare", *settings],
        stdout=subprocess.PIPE, text=True, check=True, env=environment(),
    )  # fmt: skip
    rate = re.search(r"([\d,]+) rows/s", done.stdout)
    assert rate is not None
    return {"rows_per_s": int(rate[1].replace(",", "")), "wall_s": round(time.perf_counter() - started, 1)}


def inside(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


def ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled"}


def run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("nodes: network namespaces need root")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", asked.rows)
        stack.enter_context(namespaces())
        for number, node_name in enumerate(NODES):
            stack.enter_context(node(node_name, folder / "ray", head=number == 0))
            results[f"nodes_{number + 1}"] = prepare(folder / "rows.jsonl", folder / f"stores-{number + 1}")
        manifests = {path.read_text() for path in folder.glob("stores-*/*/manifest.json")}
    rates = [result["rows_per_s"] for result in results.values()]
    result = {"rows": asked.rows, **results, "times": round(rates[1] / rates[0], 2), "same_store": len(manifests) == 1}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
