"""Initial values of LoRA, as `init_lora_weights` of PEFT's adapter_config.json names them."""

from __future__ import annotations

from typing import Any

PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Those that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) change its weights when PEFT loads the adapter."""


def changes_the_base(start: Any) -> bool:
    """start: the value of `init_lora_weights`."""
    return isinstance(start, str) and start.lower() not in PLAIN_STARTS
