"""What is trained, and the groups in which optimizers take it.

A group may have `lr_factor`: its learning rate is that of the schedule times this (LoRA+, rates by layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from raytune_llm.models.layers import layers

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    name: str
    parameter: nn.Parameter
    in_layer: bool
    """In one of the model's repeated layers: no embedding, no head, no last norm."""


def trained_in(model: nn.Module) -> list[Trained]:
    """In the model's order."""
    inside = {parameter for layer in layers(model) for parameter in layer.parameters()}
    return [Trained(name, p, p in inside) for name, p in model.named_parameters() if p.requires_grad]


def by_decay(trained: Sequence[Trained], weight_decay: float, **settings: Any) -> Groups:
    """Vectors (norms, biases) are not decayed. No group is empty."""
    matrices = [one.parameter for one in trained if one.parameter.ndim >= 2]
    vectors = [one.parameter for one in trained if one.parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, **settings} for group in groups if group["params"]]


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
