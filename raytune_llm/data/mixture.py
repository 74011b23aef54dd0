"""Mixes the rows of several sources to an epoch. Only the order of row numbers changes, so a new mixture tokenizes nothing again.

`mix` maps row numbers of a joined store (data/store.py) to row numbers; rows may be left out or repeated. It is applied after
rows have been held out, so no row is both trained on and evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from raytune_llm.data.store import Store

_MIX, _REPEAT = 2, 3
"""Streams of random numbers that are drawn from the seed, in addition to those in data/samples.py."""


def weights_of(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """The sampling weights of sources of these sizes: proportional to size at temperature 1, more even at a higher
    temperature."""
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
    """Mix these rows of a store by its sources. The same seed gives the same result.

    epochs: how often each source is used. Weights by temperature are computed from the numbers of rows after that.
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
    """Repeat each source's rows by its entry in `epochs`: 2.5 is all of them twice, plus a random half of them once more."""
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
        interleave_over     the same until all are exhausted; an exhausted source starts again
        interleave_once     until all are exhausted; an exhausted source is left out, so that every row occurs once
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
    """The source of each draw, without repeats. Rows are ordered by time: with weights, the arrival times of a Poisson process
    with the source's weight as its rate; without weights, the row's number in its source."""
    times = [
        np.arange(count, dtype=np.float64) if weights is None else np.cumsum(rng.exponential(1 / weights[source], count))
        for source, count in enumerate(counts.tolist())
    ]
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(times), kind="stable")]


def _place_of(hits: np.ndarray, number: int) -> int:
    """The index of the number-th hit, counted from 1; len(hits) if there are fewer."""
    found = np.flatnonzero(hits)
    return int(found[number - 1]) if len(found) >= number else len(hits)


STOPS: dict[str, Callable[[int], int]] = {
    "interleave_under": lambda num_sources: 1,
    "interleave_over": lambda num_sources: num_sources,
}
"""Strategy -> the number of exhausted sources at which it stops, given the number of sources."""
