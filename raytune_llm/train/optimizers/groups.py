"""What is trained, and the groups in which optimizers take it.

A group may have `lr_factor`: its learning rate is that of the schedule times this (LoRA+, rates by layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    lr_factor: float = 1.0
    """Its learning rate over that of the schedule."""


def trained_in(model: nn.Module, lr_factor: Callable[[str], float] = lambda name: 1.0) -> list[Trained]:
    """In the model's order."""
    inside = {parameter for layer in layers(model) for parameter in layer.parameters()}
    return [Trained(name, p, p in inside, lr_factor(name)) for name, p in model.named_parameters() if p.requires_grad]


def by_factor(trained: Sequence[Trained], **settings: Any) -> Groups:
    """A group for each factor of the learning rate. None is empty."""
    of_factor: dict[float, list[nn.Parameter]] = {}
    for one in trained:
        of_factor.setdefault(one.lr_factor, []).append(one.parameter)
    return [{"params": parameters, "lr_factor": factor, **settings} for factor, parameters in of_factor.items()]


def by_decay(trained: Sequence[Trained], weight_decay: float, **settings: Any) -> Groups:
    """Vectors (norms, biases) are not decayed."""
    matrices = [one for one in trained if one.parameter.ndim >= 2]
    vectors = [one for one in trained if one.parameter.ndim < 2]
    return [
        *by_factor(matrices, weight_decay=weight_decay, **settings),
        *by_factor(vectors, weight_decay=0.0, **settings),
    ]


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
