"""The trained parameters, and their groups for optimizers.

A group's `lr_factor` multiplies the schedule's learning rate (for LoRA+, or learning rates by layer).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from raytune_llm.errors import ConfigError
from raytune_llm.models.layers import layers

Groups = list[dict[str, Any]]
HEADED = ("q_proj", "k_proj")
"""Projections in an attention module whose rows belong to heads."""


class Group(NamedTuple):
    """Settings for the parameters whose names match a pattern."""

    lr_factor: float
    weight_decay: float | None
    """None: the optimizer's."""


@dataclass(frozen=True)
class Trained:
    name: str
    parameter: nn.Parameter
    layer: int | None
    """The number of the layer that it is in; None: it is in no layer (embedding, head, last norm)."""
    rows_per_head: int = 1
    """The head dimension, for weights of queries and keys; else 1."""
    lr_factor: float = 1.0
    """Its learning rate as a multiple of the schedule's."""
    weight_decay: float | None = None
    """Its own weight decay; None: the optimizer's if it is a matrix, else 0."""

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is a matrix in a layer, or its experts' matrices in one tensor [E, N, K]. The kernel of a depthwise
        convolution [N, 1, K] is not. config/optimizer.py estimates memory by the same rule."""
        weight = self.parameter
        return self.layer is not None and (weight.ndim == 2 or (weight.ndim == 3 and weight.shape[1] > 1))


def trained_in(model: nn.Module, lr_factor: Callable[[str], float] = lambda name: 1.0) -> list[Trained]:
    """The model's trained parameters, in its order. lr_factor: a parameter's name -> its learning-rate factor."""
    inside = {parameter: number for number, layer in enumerate(layers(model)) for parameter in layer.parameters()}
    heads = _rows_per_head(model)
    return [
        Trained(name, p, inside.get(p), heads.get(p, 1), lr_factor(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _rows_per_head(model: nn.Module) -> dict[nn.Parameter, int]:
    """Query or key weight -> rows per head, for modules that have a head_dim."""
    found = {}
    for module in model.modules():
        head_dim = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for name in HEADED:
            weight = getattr(getattr(module, name, None), "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] % head_dim == 0:
                found[weight] = head_dim
    return found


def with_groups(trained: Sequence[Trained], groups: Mapping[str, Group]) -> list[Trained]:
    """The parameters with the settings of the first group that matches each. Raises ConfigError for a group without
    parameters."""
    taken: set[str] = set()
    result = []
    for one in trained:
        pattern = next((pattern for pattern in groups if re.search(pattern, one.name)), None)
        if pattern is None:
            result.append(one)
            continue
        taken.add(pattern)
        group = groups[pattern]
        result.append(replace(one, lr_factor=one.lr_factor * group.lr_factor, weight_decay=group.weight_decay))
    if nothing := [pattern for pattern in groups if pattern not in taken]:
        raise ConfigError(
            "optimizer.groups",
            "must each take a trained parameter that no group before it takes",
            got=nothing[0],
            fix=f"Names are like {trained[0].name}." if trained else "Nothing is trained.",
        )
    return result


def by_decay(trained: Sequence[Trained], weight_decay: float, **settings: Any) -> Groups:
    """Parameter groups for torch: parameters with the same weight decay and learning-rate factor. Vectors (norms, biases) have no
    weight decay, unless a group of the config sets it. No group is empty."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for one in trained:
        vector = one.parameter.ndim < 2
        decay = one.weight_decay if one.weight_decay is not None else 0.0 if vector else weight_decay
        groups.setdefault((vector, decay, one.lr_factor), []).append(one.parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor, **settings}
        for (_, decay, factor), parameters in sorted(groups.items(), key=lambda entry: entry[0][0])
    ]


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
