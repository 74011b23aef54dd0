"""Small runs for tests: a tiny random model, fp32, everything logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raytune_llm import load_config
from raytune_llm.config.run import TrainRun


def tiny_run(data_path: str, cache: str, output_dir: Any, *overrides: str) -> TrainRun:
    return load_config(
        "train",
        [
            "model=tiny_random",
            "resources=inline",
            "tracking=none",
            "train.precision=fp32",
            "train.log_every_steps=1",
            "train.global_batch_size=8",
            "train.micro_batch_size=1",
            "train.epochs=2",
            "data.max_length=256",
            "data.eval_fraction=0.1",
            "optimizer.lr=1e-3",
            "optimizer.weight_decay=0.01",
            f"data.path={data_path}",
            f"data.cache={cache}",
            f"output_dir={output_dir}",
            *overrides,
        ],
    )


class PowerCut(Exception):
    """Ends a worker in the middle of its run."""


def power_cut_at(step: int | None) -> Callable[[int], None]:
    """For `on_step`: every worker stops at the same place."""

    def stepped(now: int) -> None:
        if now == step:
            raise PowerCut

    return stepped


def cut_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    """A sink that cuts the power once the step is logged."""

    def sink(record: Mapping[str, Any]) -> None:
        if record["step"] >= step:
            raise PowerCut

    return sink
