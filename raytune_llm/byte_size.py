"""Sizes as people read them."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB")


def in_units(num_bytes: float, digits: int = 1) -> str:
    """In the largest unit of which there is one: 1.5 GiB, 300.0 KiB, 12 bytes. Beyond a GiB, in GiB."""
    power = next((power for power in (3, 2, 1) if num_bytes >= 2 ** (10 * power)), 0)
    return f"{num_bytes / 2 ** (10 * power):.{digits if power else 0}f} {UNITS[power]}"
