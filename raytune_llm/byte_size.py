"""Sizes in bytes as text with a unit."""

from __future__ import annotations

UNITS = ("bytes", "KiB", "MiB", "GiB")


def in_units(num_bytes: float, digits: int = 1) -> str:
    """The size in the largest unit that it reaches, up to GiB: 1.5 GiB, 300.0 KiB, 12 bytes. digits: after the decimal point."""
    power = next((power for power in (3, 2, 1) if num_bytes >= 2 ** (10 * power)), 0)
    return f"{num_bytes / 2 ** (10 * power):.{digits if power else 0}f} {UNITS[power]}"
