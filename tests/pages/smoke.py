"""Two steps of a small random model for each pair of options that the rules let through: support.json, beside this file.

    python -m tests.pages.smoke [--again WORD ...]

Runs what support.json lacks, and the pairs whose entries hold one of the words (`--again fp8`, on a machine that has a GPU). A
pair has `ran`, or the error that refuses it by name; one that ends otherwise has `fault`, and the exit code is their number.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from raytune_llm.config.run import TrainRun
from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import UserError
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs import preflight
from raytune_llm.runs.worker import work
from raytune_llm.runs.workspace import Workspace
from tests.group import Group
from tests.invariant.test_multimodal_models import stored
from tests.pages import support

RECORDED = Path(__file__).with_name("support.json")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "deepspeed")
STEPS = 2
WORKERS = 2
OF_WORKERS = "raytune_llm.errors."


class Smoke:
    """Runs in one folder, which share their token stores and, under a strategy that shards, their workers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._workspace, self._group = folder, Workspace(), None
        self._found: dict[str, str] = {}
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._multimodal = stored("gemma3", folder / "multimodal")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def outcome(self, choice: Mapping[str, str]) -> str:
        """`ran`, or what refuses it. Raises what is no refusal. The same run in another pair is not made again."""
        key = json.dumps(support.REST | choice, sort_keys=True)
        if key not in self._found:
            self._found[key] = self._outcome(support.run_of(choice))
        return self._found[key]

    def _outcome(self, run: TrainRun) -> str:
        with tempfile.TemporaryDirectory(dir=self._folder) as output:
            model = run.model if run.model.path is None else replace(run.model, path=self._multimodal)
            data = replace(run.data, cache=str(self._folder / "stores"))
            # Compiled, each pair would take half a minute.
            train = replace(run.train, compile=False) if self._device == "cuda" else run.train
            run = replace(run, model=model, data=data, train=train, output_dir=output)
            try:
                preflight.check(run, self._workspace)
                store = str(prepare(run.model, run.data, run.resources, kind=run.stage.kind).store.folder)
                (self._in_a_group if run.strategy.shards else self._here)(run, store)
            except UserError as error:
                return str(error)
            losses = [record["loss"] for record in read_metrics(Path(output) / "metrics.jsonl") if "loss" in record]
            assert len(losses) == STEPS and all(map(math.isfinite, losses)), losses
            assert list(Path(output, "final").glob("*.safetensors")), "nothing was saved"
        return support.RAN_ON_GPU if self._device == "cuda" else support.RAN

    def _here(self, run: TrainRun, store: str) -> None:
        work(run, store, None, device=torch.device(self._device), workspace=self._workspace)

    def _in_a_group(self, run: TrainRun, store: str) -> None:
        self._group = self._group or Group(min(WORKERS, torch.cuda.device_count() or WORKERS), self._device)
        try:
            self._group.run(run, store)
        except BaseException as error:
            self._close()
            last = str(error).strip().splitlines()[-1]
            if last.startswith(OF_WORKERS):
                raise UserError(last.partition(": ")[2]) from error
            raise

    def _close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


def versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {package: metadata.version(package).partition("+")[0] for package in PACKAGES if package in installed}


def recorded_with(pairs: Mapping[str, str]) -> dict[str, Any]:
    """The record with these pairs. The versions are this machine's, which has a GPU or has none; the other's stay."""
    before = support.recorded() if RECORDED.exists() else {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here: dict[str, Any] = {support.CPU: versions()} if gpu is None else {support.GPU: {"device": gpu, **versions()}}
    return before | here | {"pairs": dict(pairs)}


def record(pairs: Iterable[str], known: Mapping[str, str]) -> int:
    """Run pairs and write what is known after each. How many ended without `ran` or a refusal."""
    choices, found = support.accepted(), {}
    with tempfile.TemporaryDirectory() as folder, Smoke(Path(folder)) as smoke:
        for pair in pairs:
            try:
                found[pair] = smoke.outcome(choices[pair])
            except Exception as error:
                traceback.print_exc()
                found[pair] = f"{support.FAULT}: {str(error).strip().splitlines()[-1]}"
            print(f"{pair}: {found[pair]}", flush=True)
            ordered = {one: said for one in choices if (said := (known | found).get(one)) is not None}
            RECORDED.write_text(json.dumps(recorded_with(ordered), indent=1) + "\n", encoding="utf-8")
    return sum(said.startswith(support.FAULT) for said in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=[], metavar="WORD")
    again = parser.parse_args().again
    known = support.recorded()["pairs"] if RECORDED.exists() else {}
    kept = {pair: said for pair, said in known.items() if not any(word in f"{pair}: {said}" for word in again)}
    return record([pair for pair in support.accepted() if pair not in kept], known)


if __name__ == "__main__":
    sys.exit(main())
