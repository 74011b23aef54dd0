from __future__ import annotations

from raytune_llm.data.dropped import Dropped


def test_rows_that_were_dropped_for_the_same_reason_are_named_together():
    dropped = Dropped()
    for row, detail in ((1, "it is a pair"), (2, "it is a pair"), (5, "it is a: text"), (6, "it is a pair")):
        dropped.add("the row is not a conversation", detail, f"a, b.json, row {row}")
    dropped.add("the row is empty", "", "c.json, row 3")
    first = "4 x the row is not a conversation (a, b.json, rows 1, 2: it is a pair | a, b.json, row 5: it is a: text)"
    assert str(dropped) == f"{first}; 1 x the row is empty (c.json, row 3)"
