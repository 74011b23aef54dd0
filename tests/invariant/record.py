"""Numbers of small runs, recorded so that code can be moved about and shown to compute what it did.

    python -m tests.invariant.record             say how far each run is from recorded/*.json
    python -m tests.invariant.record --write     record anew: only where numbers are meant to change
    ... [--runs dpo_online kto] [--places inline fsdp]

A run is a tiny random model in fp32 over rows made here from a seed; everything is logged, at each step. A place is where it
trains: `inline` in this process, or under a strategy on two processes that gloo connects. Runs differ by settings alone and are
started through `load_config`, `api.train` and `tests.group`, so that it does not matter here what lies where in the package.

With the processor and the versions that made a recording, the code repeats it bit for bit, interrupted or not; all metrics are
compared, to 1e-6. Elsewhere sums may be taken in another order: there `COMPARED_EVERYWHERE` are compared, to 1e-4. Metrics that a
recording lacks are not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from raytune_llm import api, load_config
from tests.group import Group
from tests.runs import PowerCut, cut_at

RECORDED = Path(__file__).parent / "recorded"
TOLERANCE, TOLERANCE_ELSEWHERE = 1e-6, 1e-4
COMPARED_EVERYWHERE = {"step", "epoch", "lr", "tokens_seen", "loss", "grad_norm", "eval_loss"}
"""Relative to their size. The others may be differences that come near 0, as margins do, and are compared absolutely below 1."""
MACHINE = {"tokens_per_s", "memory_gib", "mfu"}
"""Metrics that are not the run's alone."""
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
PLACES = ("inline", *STRATEGIES)
CUT_AFTER = 3
"""Where an interrupted run ends; it resumes from the checkpoint of the step before."""

TINY = (
    "model=tiny_random", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
    "train.max_steps=5", "train.epochs=3", "train.global_batch_size=4", "train.micro_batch_size=1",
    "train.eval_every_steps=3", "checkpoint.every_steps=2", "data.max_length=192", "data.eval_fraction=0.15",
    "optimizer.lr=3e-3", "optimizer.weight_decay=0.1", "schedule.warmup_ratio=0",
)  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "sft_packed": ("data=chat", "data.overlong=llamafactory", "data.path={rows}/chat.jsonl", "adapter=lora"),
    "sft_unpacked": (
        "data=chat", "data.overlong=llamafactory", "data.path={rows}/chat.jsonl", "adapter=none", "data.packing=false",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
    ),
    "pretrain": ("data=text", "data.path={rows}/text.jsonl", "stage=pretrain", "adapter=none"),
    "dpo_precomputed": (
        "data=chat_pairs", "data.path={rows}/pairs.jsonl", "stage=dpo", "stage.reference=precomputed", "adapter=none",
        "data.share_prompts=false",
    ),
    "dpo_online": (
        "data=chat_pairs", "data.path={rows}/pairs.jsonl", "stage=dpo", "stage.reference=online", "adapter=lora",
        "data.share_prompts=true",
    ),
    "kto": ("data=chat_labeled", "data.path={rows}/labeled.jsonl", "stage=kto", "adapter=lora"),
    "reward": ("data=chat_pairs", "data.path={rows}/pairs.jsonl", "stage=reward", "adapter=lora"),
    "orpo": ("data=chat_pairs", "data.path={rows}/pairs.jsonl", "stage=orpo", "adapter=none"),
    "streaming": (
        "data=chat", "data.overlong=llamafactory", "data.path={rows}/stream", "adapter=lora", "data.streaming=true",
        "data.streaming_buffer_rows=17",
        "data.eval_fraction=0", "train.eval_every_steps=null", "train.epochs=1",
    ),
    "mixture": (
        "data=chat", "data.dataset_info={rows}/dataset_info.json", "data.names=[first,second]", "data.mix=interleave_over",
        "data.mix_weights=[0.7,0.3]", "data.eval_fraction=0", "data.eval_names=[third,fourth]", "adapter=none",
    ),
}  # fmt: skip
IMPOSSIBLE = {("dpo_online", "zero3")}
"""A partitioned model can't be its own reference within a step."""
CASES = [(run, place) for run in RUNS for place in PLACES if (run, place) not in IMPOSSIBLE]

Numbers = dict[str, list[float]]
"""Each metric's values, in the order of the records that have it."""


def write_rows(folder: Path) -> None:
    """Rows of every kind, the same ones each time."""
    draw = random.Random(12)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "small", "birds", "look", "on"]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": text(2, 11)}

    def chats(count: int) -> list[dict[str, Any]]:
        return [
            {"messages": [message(role) for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]}
            for _ in range(count)
        ]

    def instructions(count: int) -> list[dict[str, Any]]:
        return [{"instruction": text(1, 9), "output": text(1, 9)} for _ in range(count)]

    pairs = [{"messages": [message("user")], "chosen": message("assistant"), "rejected": message("assistant")} for _ in range(36)]
    labeled = [{"messages": [message("user"), message("assistant")], "label": draw.random() < 0.6} for _ in range(40)]
    files = {
        "chat": chats(48),
        "text": [{"text": text(5, 60)} for _ in range(40)],
        "pairs": pairs,
        "labeled": labeled,
        **{f"stream/{number}": chats(12) for number in range(3)},
        **{name: instructions(count) for name, count in {"first": 30, "second": 12, "third": 5, "fourth": 7}.items()},
    }
    (folder / "stream").mkdir(parents=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("first", "second", "third", "fourth")}
    (folder / "dataset_info.json").write_text(json.dumps(entries))


class Runner:
    """Trains runs over the same rows; outside of this process on `group`, which is of two."""

    def __init__(self, folder: Path, group: Group | None = None) -> None:
        self.folder, self.rows, self._group = folder, folder / "rows", group
        write_rows(self.rows)

    def numbers(self, name: str, place: str, *, interrupted: bool = False) -> Numbers:
        """What the run logs, where interrupted until the cut and from its checkpoint on."""
        output = self.folder / f"{name}-{place}{'-interrupted' * interrupted}"
        # An interrupted run makes a store of its own, so that a stream is cut off too.
        stores = f"{output}-stores" if interrupted else f"{self.folder}/stores"
        settings = [setting.format(rows=self.rows) for setting in (*TINY, *RUNS[name])]
        settings += [f"data.cache={stores}", f"output_dir={output}"]
        kept: list[dict[str, float]] = []
        if interrupted:
            self._train(settings, place, stop_after=CUT_AFTER)
            kept = [record for record in read(output) if record["step"] < CUT_AFTER]
        self._train(settings, place)
        records = read(output)
        # Had it begun anew, these would have other times.
        assert records[: len(kept)] == kept and bool(kept) == interrupted
        return columns(records)

    def _train(self, settings: Sequence[str], place: str, *, stop_after: int | None = None) -> None:
        if place != "inline":
            self._train_on_two_workers(settings, place, stop_after)
            return
        run = load_config("train", ["resources=inline", *settings])
        with nullcontext() if stop_after is None else pytest.raises(PowerCut):
            api.train(run, sinks=[] if stop_after is None else [cut_at(stop_after)])

    def _train_on_two_workers(self, settings: Sequence[str], strategy: str, stop_after: int | None) -> None:
        run = load_config("train", ["resources=local", f"strategy={strategy}", *settings])
        read_by_prepare = re.compile(r"(model|data|stage)\b")
        stores = api.prepare(load_config("prepare", ["resources=inline", *filter(read_by_prepare.match, settings)]))
        eval_store = None if stores.eval_store is None else str(stores.eval_store.folder)
        assert self._group is not None
        self._group.run(run, str(stores.folder), eval_store, stop_after=stop_after)


def read(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def columns(records: Sequence[Mapping[str, float]]) -> Numbers:
    """To ten digits."""
    found: Numbers = {}
    for record in records:
        for name, value in record.items():
            if name not in MACHINE:
                found.setdefault(name, []).append(float(f"{value:.10g}"))
    return found


def made_with() -> dict[str, str]:
    """What decides in which order a sum is taken."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "processor": f"{model[1] if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def recorded(name: str) -> dict[str, Any]:
    """{"made_with": ..., place: Numbers}"""
    return json.loads((RECORDED / f"{name}.json").read_text())


def differences(name: str, place: str, numbers: Numbers) -> dict[str, float]:
    """The largest difference from the recording by metric, as a part of what is allowed."""
    recording = recorded(name)
    at_home = recording["made_with"] == made_with()
    allowed = TOLERANCE if at_home else TOLERANCE_ELSEWHERE
    return {
        metric: largest_difference(values, numbers.get(metric, []), floor=0 if metric in COMPARED_EVERYWHERE else 1) / allowed
        for metric, values in recording[place].items()
        if at_home or metric in COMPARED_EVERYWHERE
    }


def largest_difference(values: Sequence[float], others: Sequence[float], *, floor: float) -> float:
    """Relative to the larger value, or to `floor` where both are smaller. Infinite where their numbers differ or one is NaN."""
    if len(values) != len(others):
        return math.inf
    found = [abs(a - b) / max(abs(a), abs(b), floor) if a != b else 0.0 for a, b in zip(values, others, strict=True)]
    return math.inf if any(map(math.isnan, found)) else max(found)


def write(name: str, places: Mapping[str, Numbers]) -> None:
    """A line a metric. Other places stay as they are where this processor and these versions made them, and go where not."""
    path = RECORDED / f"{name}.json"
    before = recorded(name) if path.exists() else {}
    kept = before if before.get("made_with") == made_with() else {}
    RECORDED.mkdir(exist_ok=True)
    sections = [f'"made_with": {json.dumps(made_with())}']
    for place in PLACES:
        if numbers := places.get(place, kept.get(place)):
            lines = ",\n".join(f"  {json.dumps(metric)}: {json.dumps(values)}" for metric, values in sorted(numbers.items()))
            sections.append(f'"{place}": {{\n{lines}\n}}')
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def record(runner: Runner, cases: Sequence[tuple[str, str]]) -> None:
    found: dict[str, dict[str, Numbers]] = {}
    for name, place in cases:
        found.setdefault(name, {})[place] = runner.numbers(name, place)
    for name, places in found.items():
        write(name, places)


def compare(runner: Runner, cases: Sequence[tuple[str, str]]) -> bool:
    """Print each run's largest difference, uninterrupted and interrupted; whether all are within what is allowed."""
    within = True
    for name, place in cases:
        for interrupted in (False, True):
            differs = differences(name, place, runner.numbers(name, place, interrupted=interrupted))
            worst = max(differs, key=lambda metric: differs[metric])
            within &= differs[worst] <= 1
            how = "interrupted" if interrupted else ""
            print(f"{name:16} {place:7} {how:12} {differs[worst]:8.3g} of what is allowed, in {worst}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record anew, in place of comparing")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(name, place) for name, place in CASES if name in given.runs and place in given.places]
    with ExitStack() as stack:
        group = stack.enter_context(closing(Group(2))) if set(given.places) - {"inline"} else None
        runner = Runner(Path(stack.enter_context(tempfile.TemporaryDirectory())), group)
        if not given.write:
            return int(not compare(runner, cases))
        record(runner, cases)
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
