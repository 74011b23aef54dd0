"""Imports PEFT without two packages for its own quantized layers, which are slow to import and which this project does not use.

PEFT would otherwise import them with the first layer of an adapter. It caches that they are not installed.
"""

from raytune_llm.models.hidden import hidden

with hidden("bitsandbytes", "hqq"):
    import peft  # noqa: F401
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    is_bnb_available()
    is_bnb_4bit_available()


def find_bitsandbytes() -> None:
    """Let PEFT find bitsandbytes from now on, if it is installed."""
    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()
