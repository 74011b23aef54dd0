"""Metrics that compare generated answers with references.

A metric is a function (answers, references, rows) -> {name: number}, in a file here or in a file of the user (own.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.predict.metrics.bleu import bleu
from raytune_llm.predict.metrics.llamafactory import llamafactory
from raytune_llm.predict.metrics.own import own_metric
from raytune_llm.predict.metrics.rouge import rouge
from raytune_llm.predict.metrics.words import exact_match, f1

Numbers = Mapping[str, float | str]
Metric = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Numbers]

METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": f1,
    "bleu": bleu,
    "rouge": rouge,
    "llamafactory": llamafactory,
}


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """The metrics by name. Each is tried on one answer, so that a missing package is noticed at once. Raises ConfigError or
    ResourceError."""
    found = []
    for name in names:
        if name not in METRICS and ":" not in name:
            rule = f"must hold names of {', '.join(METRICS)}, or functions as FILE.py:NAME"
            raise ConfigError("predict.metrics", rule, got=name)
        metric = METRICS.get(name) or own_metric(name)
        if name in METRICS:
            try:
                metric(["a b"], ["a c"], [{}])
            except ImportError as error:
                raise ResourceError(f"predict.metrics={name} needs {error.name}", "pip install raytune-llm[metrics]") from None
        found.append(metric)
    return found
