"""How many adapters may be pinned: one slot is left for the others, or requests for them would wait for ever."""

from __future__ import annotations

from collections.abc import Iterable

from raytune_llm.errors import ConfigError


def check_pin(name: str, pinned: Iterable[str], num_slots: int) -> None:
    """Raises ConfigError if `name` can't be pinned beside those that are."""
    others = sorted({*pinned} - {name})
    if len(others) + 2 > num_slots:
        raise ConfigError(
            "pinned adapters",
            f"must be fewer than the slots for adapters, of which there are {num_slots}, so that others can be served",
            got=[*others, name],
            fix="Unpin one, or raise serve.max_adapters.",
        )
