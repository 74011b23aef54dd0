"""How rows of several sources become the rows of an epoch: a property of the order, so that changing it tokenizes nothing.

`mix` takes row numbers of a joined store (data/store.py) and gives row numbers, in which rows may be left out or come again. It
is applied after rows have been held out, so that no row is trained on that is also evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from raytune_llm.data.store import Store

_MIX, _REPEAT = 2, 3
"""These uses of the seed, beside those of data/loader.py."""


def weights_of(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """Shares of sources of these sizes: proportional to size at temperature 1, the more even the higher it is."""
    powers = np.asarray(sizes, np.float64) ** (1 / temperature)
    return powers / powers.sum()


def mixed_rows(
    store: Store,
    rows: np.ndarray,
    *,
    strategy: str,
    weights: Sequence[float] | None,
    temperature: float | None,
    epochs: Sequence[float] | None,
    seed: int,
) -> np.ndarray:
    """These rows of a store as its sources are mixed, the same for the same seed.

    `epochs` says how often each source is there; shares by temperature are of what is there then.
    """
    if epochs is not None and len(rows):
        rows = repeated(rows, store.row_sources[rows], epochs, seed)
    if not len(store.members) or not len(rows):
        return rows
    sources = store.row_sources[rows]
    present, sources = np.unique(sources, return_inverse=True)
    if temperature is not None:
        weights = weights_of(np.bincount(sources).tolist(), temperature).tolist()
    elif weights is not None:
        weights = [weights[source] for source in present.tolist()]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_MIX,))))
    return mix(rows, sources, strategy=strategy, weights=weights, rng=rng)


def repeated(rows: np.ndarray, sources: np.ndarray, epochs: Sequence[float], seed: int) -> np.ndarray:
    """Each source's rows as often as its entry in `epochs` says: 2.5 is all of them twice, and half of them drawn once more."""
    parts: list[np.ndarray] = []
    for source, times in enumerate(epochs):
        mine = rows[sources == source]
        whole = int(times)
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_REPEAT, source))))
        drawn = draw.permutation(len(mine))[: round((times - whole) * len(mine))]
        parts += [mine] * whole + [mine[np.sort(drawn)]]
    return np.concatenate(parts)


def mix(
    rows: np.ndarray, sources: np.ndarray, *, strategy: str, weights: Sequence[float] | None, rng: np.random.Generator
) -> np.ndarray:
    """Row numbers in the order in which they are drawn.

    `sources` is the source of each row, 0 to n - 1. `strategy` is one of

        concat              every row once, source after source
        interleave_under    sources in turn, or by weight, until one is exhausted (in turn: to the end of that round)
        interleave_over     the same until all are exhausted; a source that is exhausted starts again
        interleave_once     until all are exhausted; a source that is exhausted is left out, so that every row comes once
    """
    if strategy == "concat":
        return rows[np.argsort(sources, kind="stable")]
    counts = np.bincount(sources)
    assert counts.min() > 0, "every source has rows"
    drawn = _turns(counts, strategy, weights, rng)
    places = np.empty(len(drawn), np.int64)
    firsts = np.cumsum([0, *counts[:-1]])
    for source, count in enumerate(counts.tolist()):
        mine = np.flatnonzero(drawn == source)
        places[mine] = firsts[source] + np.arange(len(mine)) % count
    return rows[np.argsort(sources, kind="stable")][places]


def _turns(counts: np.ndarray, strategy: str, weights: Sequence[float] | None, rng: np.random.Generator) -> np.ndarray:
    """The source of each draw."""
    num_sources = len(counts)
    if strategy == "interleave_once":
        return _turns_without_repeats(counts, weights, rng)
    num_exhausted = STOPS[strategy](num_sources)
    if weights is None:
        return np.tile(np.arange(num_sources), np.sort(counts)[num_exhausted - 1])
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    drawn = np.zeros(0, np.int64)
    while True:
        drawn = np.concatenate([drawn, rng.choice(num_sources, size=int(counts.sum()), p=shares)])
        ends = sorted(_place_of(drawn == source, count) for source, count in enumerate(counts.tolist()))
        if ends[num_exhausted - 1] < len(drawn):
            return drawn[: ends[num_exhausted - 1] + 1]


def _turns_without_repeats(counts: np.ndarray, weights: Sequence[float] | None, rng: np.random.Generator) -> np.ndarray:
    """Each row of a source has a time: with weights those of a Poisson process of that rate, else its number."""
    times = [
        np.arange(count, dtype=np.float64) if weights is None else np.cumsum(rng.exponential(1 / weights[source], count))
        for source, count in enumerate(counts.tolist())
    ]
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(times), kind="stable")]


def _place_of(hits: np.ndarray, number: int) -> int:
    """Where the number-th hit is, counted from 1; past the end if it is not there."""
    found = np.flatnonzero(hits)
    return int(found[number - 1]) if len(found) >= number else len(hits)


STOPS: dict[str, Callable[[int], int]] = {
    "interleave_under": lambda num_sources: 1,
    "interleave_over": lambda num_sources: num_sources,
}
"""How many of so many sources are exhausted when it stops."""
