"""Loads PEFT without two packages for its quantized layers. This project has its own, which load what they need.

PEFT would load them once more with the first layer of an adapter; it remembers that they are not there.
"""

from raytune_llm.models.hidden import hidden

with hidden("bitsandbytes", "hqq"):
    import peft  # noqa: F401
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    is_bnb_available()
    is_bnb_4bit_available()


def find_bitsandbytes() -> None:
    """From now on, PEFT sees it where it is installed."""
    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()
