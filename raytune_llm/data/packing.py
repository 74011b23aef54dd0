"""Packs rows by best-fit decreasing over the full data set, from their lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Pack p holds the rows `rows[offsets[p] : offsets[p + 1]]`."""

    rows: np.ndarray
    """int32: every row number once, grouped by pack."""
    offsets: np.ndarray
    """int64 [packs + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.rows[self.offsets[pack] : self.offsets[pack + 1]]


def plan(lengths: np.ndarray, capacity: int) -> Packs:
    """Each row, longest first, goes to the fullest pack that still has room for it (Johnson 1974, best-fit decreasing).

    Rows of one length are interchangeable, and so are packs with equal room left. So all rows of a length are placed at once:
    first in the packs with the least sufficient room, then in those with the next larger room, and the remaining ones in new
    packs. The result is exactly that of best-fit decreasing, with work that grows with the number of distinct lengths, not of
    rows. Lengths are in tokens, 1 to capacity. The same lengths always give the same packs.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int32), np.zeros(1, np.int64))
    assert lengths.min() >= 1, "an empty row can't be packed"
    assert lengths.max() <= capacity, f"a row of {lengths.max()} tokens is longer than a pack of {capacity}"

    longest_first = np.argsort(-lengths.astype(np.int32), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    pack_of = np.empty(len(lengths), np.int64)  # in the order of longest_first
    num_packs = placed = 0
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # tokens left -> packs
    num_with_room = np.zeros(capacity + 1, np.int64)

    def place(packs: np.ndarray, left: int, length: int, remaining: int) -> int:
        """Fill these packs, which have `left` tokens of room, with rows of this length. Returns the number of placed rows."""
        nonlocal placed
        fit = left // length
        num_full = min(len(packs), remaining // fit)
        full, rest = packs[:num_full], packs[num_full:]
        targets = [np.repeat(full, fit)]
        store(full, left - fit * length)
        partial = remaining - num_full * fit if len(rest) else 0
        if partial:
            targets.append(np.repeat(rest[:1], partial))
            store(rest[:1], left - partial * length)
            rest = rest[1:]
        store(rest, left)
        rows = np.concatenate(targets)
        pack_of[placed : placed + len(rows)] = rows
        placed += len(rows)
        return len(rows)

    def store(packs: np.ndarray, left: int) -> None:
        if len(packs):
            room[left].append(packs)
            num_with_room[left] += len(packs)

    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        for left in (length + np.flatnonzero(num_with_room[length:])).tolist():
            packs = np.concatenate(room[left])
            room[left], num_with_room[left] = [], 0
            remaining -= place(packs, left, length, remaining)
            if not remaining:
                break
        if remaining:
            new = np.arange(num_packs, num_packs - (-remaining // (capacity // length)))
            num_packs += len(new)
            place(new, capacity, length, remaining)

    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return Packs(longest_first[np.argsort(pack_of, kind="stable")].astype(np.int32), offsets)
