"""What is trained, and the groups in which optimizers take it.

A group may have `lr_factor`: its learning rate is that of the schedule times this (LoRA+, rates by layer).
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
"""The projections of an attention module whose rows belong to its heads."""


class Group(NamedTuple):
    """What differs for the parameters in whose names a pattern is found."""

    lr_factor: float
    weight_decay: float | None
    """None: as for the others."""


@dataclass(frozen=True)
class Trained:
    name: str
    parameter: nn.Parameter
    layer: int | None
    """The number of the repeated layer that it is in; None: embedding, head or last norm."""
    rows_per_head: int = 1
    """The head dimension in weights of queries and keys; 1 elsewhere."""
    lr_factor: float = 1.0
    """Its learning rate over that of the schedule."""
    weight_decay: float | None = None
    """Its own; None: the optimizer's, for matrices."""

    @property
    def is_layer_matrix(self) -> bool:
        """A matrix of a layer, or those of its experts in one tensor [E, N, K]; not what a convolution has for channels of their
        own, [N, 1, K]. Memory is counted alike (config/optimizer.py)."""
        weight = self.parameter
        return self.layer is not None and (weight.ndim == 2 or (weight.ndim == 3 and weight.shape[1] > 1))


def trained_in(model: nn.Module, lr_factor: Callable[[str], float] = lambda name: 1.0) -> list[Trained]:
    """In the model's order."""
    inside = {parameter: number for number, layer in enumerate(layers(model)) for parameter in layer.parameters()}
    heads = _rows_per_head(model)
    return [
        Trained(name, p, inside.get(p), heads.get(p, 1), lr_factor(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _rows_per_head(model: nn.Module) -> dict[nn.Parameter, int]:
    """Query or key weight -> rows of each head, for modules that have head_dim."""
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
    """With what the groups say. Raises ConfigError for a group that takes nothing."""
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
    """Those of one decay and factor of the rate together. Vectors (norms, biases) are not decayed, unless a group of the config
    says so. No group is empty."""
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
