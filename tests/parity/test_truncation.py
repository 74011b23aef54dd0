from __future__ import annotations

from raytune_llm.data.tokens.truncation import shares
from tests.parity.sets import recorded


def test_requests_and_answers_keep_the_recorded_shares():
    rows = [row for row in recorded("truncation") if "error" not in row["expected"]]
    assert rows
    for row in rows:
        kept = shares(row["source_len"], row["target_len"], row["cutoff_len"])
        assert kept == (row["expected"]["source_keep"], row["expected"]["target_keep"]), row["id"]
