"""Packs rows by best-fit decreasing over the full data set, from their lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Pack p holds the rows `rows[offsets[p] : offsets[p + 1]]`."""

    rows: np.ndarray
    """int32 (int64 for 2**31 rows and more): every row number once, grouped by pack."""
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

    open_packs = _OpenPacks(capacity)
    num_packs, placed = 0, []
    for length, remaining in reversed(list(enumerate(np.bincount(lengths).tolist()))):
        for room in open_packs.rooms(length) if remaining else ():
            placed.append(open_packs.fill(open_packs.take(room), room, length, remaining))
            remaining -= len(placed[-1])
            if not remaining:
                break
        if remaining:
            new = np.arange(num_packs, num_packs - (-remaining // (capacity // length)))
            num_packs += len(new)
            placed.append(open_packs.fill(new, capacity, length, remaining))

    pack_of = np.concatenate(placed)
    longest_first = np.argsort(-lengths.astype(np.int32), kind="stable")
    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return Packs(longest_first[np.argsort(pack_of, kind="stable")].astype(type_of_numbers(len(lengths))), offsets)


def type_of_numbers(count: int) -> type[np.signedinteger]:
    """The smallest type that holds the numbers of so many rows."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


class _OpenPacks:
    """Numbers of the packs that may take more rows, by their room: the tokens that are left in them."""

    def __init__(self, capacity: int) -> None:
        self._with_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._num_with_room = np.zeros(capacity + 1, np.int64)

    def rooms(self, length: int) -> list[int]:
        """The rooms that packs have and a row of this length fits in, the least first."""
        return (length + np.flatnonzero(self._num_with_room[length:])).tolist()

    def take(self, room: int) -> np.ndarray:
        """All packs with this room, which are no longer open."""
        packs = np.concatenate(self._with_room[room])
        self._with_room[room], self._num_with_room[room] = [], 0
        return packs

    def fill(self, packs: np.ndarray, room: int, length: int, num_rows: int) -> np.ndarray:
        """Place up to num_rows rows of this length in these packs, pack by pack, and open them again with what is left. Returns
        the pack of each placed row."""
        fit = room // length
        num_full = min(len(packs), num_rows // fit)
        full, rest = packs[:num_full], packs[num_full:]
        placed = [np.repeat(full, fit)]
        self._open(full, room - fit * length)
        in_last = num_rows - num_full * fit if len(rest) else 0
        if in_last:
            placed.append(np.repeat(rest[:1], in_last))
            self._open(rest[:1], room - in_last * length)
            rest = rest[1:]
        self._open(rest, room)
        return np.concatenate(placed)

    def _open(self, packs: np.ndarray, room: int) -> None:
        if len(packs):
            self._with_room[room].append(packs)
            self._num_with_room[room] += len(packs)
