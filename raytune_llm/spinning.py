"""How long OpenMP's threads wait for each other awake.

With GCC's OpenMP, which torch uses on Linux, a thread that waits for others spins for milliseconds before it sleeps. If another
process uses the cores too, they keep the thread that they wait for from running, in every operation.

Beside one busy process, a decoding step of a small model on two cores took over ten times as long. With 3,000 spins (0.1 ms)
it takes two to three times as long. On idle cores, the price is that threads fall asleep between some operations: none in a plain
loop of products, 5 to 11% for answers through HTTP.
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
