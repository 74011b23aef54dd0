"""How long OpenMP's threads wait for each other awake.

With GCC's OpenMP, which torch uses on Linux, a thread that waits for others spins for milliseconds before it sleeps. If another
process uses the cores too, they keep the thread that they wait for from running, in every operation.

With 3,000 spins (0.1 ms), operations beside a busy process are faster (`scripts/bench decode`). On idle cores, the
price is that threads fall asleep between some operations (`scripts/bench serve_waits`). docs/serving.md has the figures.
"""

from __future__ import annotations

import os

SPINNING = {"GOMP_SPINCOUNT": "3000"}
"""Environment variables that OpenMP reads once, when torch is imported."""


def spin_briefly() -> None:
    """To be called before torch is imported. Settings of the user's own are kept."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPINNING.items():
            os.environ.setdefault(name, value)
