"""Exports a run's metrics through Ray, so that Prometheus scrapes them from every node and Grafana shows them. [ray]

Ray adds the prefix `ray_` to the names here, and the tag `run`. cluster/grafana/training.json is a dashboard for them. Ray drops
a value that is not set for about 20 s, so each is set repeatedly until a newer one comes.
"""

from __future__ import annotations

import math
import string
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

GAUGES = {
    "step": "Optimizer steps that are done",
    "loss": "Training loss of the last log step",
    "eval_loss": "Loss over the held-out rows, of the last evaluation",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens_seen": "Trained tokens, padding not counted",
    "tokens_per_s": "Tokens a second, over all workers",
    "mfu": "Model FLOPs utilization, 0 to 1",
    "memory_gib": "Peak memory of rank 0 in GiB",
    "data_wait": "Fraction of the time, 0 to 1, that rank 0 waited for batches since the last log step",
    "checkpoint_s": "Seconds that training waited for the last checkpoint",
    "workers": "Workers of the group, which changes where resources.num_workers is a range",
    "failures": "Worker failures that the run has survived, or ended by",
}
"""Name of a record's field, or of another metric -> description."""
PREFIX = "raytune_llm_"
SET_AGAIN_S = 5.0
"""Interval at which values are set again. Ray exports what was set in the last ten seconds."""


class RayMetrics:
    """Exports the metrics of one run, from construction until `close`. The process must be connected to Ray."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": quote(run, safe=string.printable)}  # Ray refuses values that are not ASCII
        self._gauges = {name: Gauge(f"{PREFIX}{name}", text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._values: dict[str, float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._set_again, name="metrics", daemon=True)
        self._thread.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """A sink: sets the gauges of the fields that a record has."""
        for name in record.keys() & self._gauges.keys():
            self.measured(name, record[name])

    def measured(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self._values[name] = value
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        self._closed.set()

    def _set_again(self) -> None:
        while not self._closed.wait(SET_AGAIN_S):
            for name, value in list(self._values.items()):
                self._gauges[name].set(value, tags=self._tags)
