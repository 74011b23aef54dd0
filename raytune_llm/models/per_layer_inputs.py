"""Embeddings that every layer has of its own, looked up by token (Gemma 3n and Gemma 4), beside those that go in at the bottom.

transformers looks them up where it is given tokens. A policy gives embeddings, so it looks them up itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def looks_up(text: nn.Module) -> bool:
    return bool(getattr(getattr(text, "config", None), "hidden_size_per_layer_input", None))


def per_layer_inputs(text: nn.Module, ids_BT: Tensor) -> dict[str, Tensor]:
    """Arguments of the text model's forward; none for other models."""
    look_up: Any = text.get_per_layer_inputs if looks_up(text) else None
    return {} if look_up is None else {"per_layer_inputs": look_up(ids_BT)}
