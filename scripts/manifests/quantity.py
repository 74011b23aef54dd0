"""Kubernetes' quantities: 500m, 16Gi, 2."""

from __future__ import annotations

import re
from typing import Any

SUFFIXES = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class QuantityError(ValueError):
    """A text that Kubernetes takes for no quantity."""


def amount(quantity: Any) -> float:
    """In its unit: 16Gi is 2**34. Raises QuantityError."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(\w*)", str(quantity))
    if found is None or found[2] not in SUFFIXES:
        raise QuantityError(f"a quantity is a number with a suffix of {', '.join(filter(None, SUFFIXES))}, got {quantity}")
    return float(found[1]) * SUFFIXES[found[2]]
