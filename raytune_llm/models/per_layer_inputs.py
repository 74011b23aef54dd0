"""Per-layer embeddings of tokens (Gemma 3n and Gemma 4), which are inputs of every layer in addition to the hidden states.

transformers looks them up if it gets tokens. A policy passes embeddings instead of tokens, so it looks them up here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def looks_up(text: nn.Module) -> bool:
    return bool(getattr(getattr(text, "config", None), "hidden_size_per_layer_input", None))


def per_layer_inputs(text: nn.Module, ids_BT: Tensor) -> dict[str, Tensor]:
    """Arguments for the text model's forward; empty for models without such embeddings."""
    look_up: Any = text.get_per_layer_inputs if looks_up(text) else None
    return {} if look_up is None else {"per_layer_inputs": look_up(ids_BT)}
