"""Loads PEFT without two packages for its quantized layers. This project has its own, which load what they need."""

from raytune_llm.models.hidden import hidden

with hidden("bitsandbytes", "hqq"):
    import peft  # noqa: F401
