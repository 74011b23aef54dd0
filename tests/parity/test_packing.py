from __future__ import annotations

import numpy as np

from raytune_llm.data.packing import plan
from tests.parity.sets import recorded


def test_packs_hold_what_the_recorded_ones_hold_and_are_no_more():
    rows = [row for row in recorded("packing_knapsack") if isinstance(row["expected"], list)]
    assert rows
    for row in rows:
        fitting = np.array([length for length in row["lengths"] if 0 < length <= row["capacity"]], np.int64)
        packs = plan(fitting, row["capacity"])
        ours = [fitting[packs[pack]].tolist() for pack in range(len(packs))]
        assert all(sum(pack) <= row["capacity"] for pack in ours)
        assert sorted(length for pack in ours for length in pack) == sorted(
            length for pack in row["expected"] for length in pack if length
        )
        assert len(ours) <= sum(1 for pack in row["expected"] if any(pack)), row["id"]
