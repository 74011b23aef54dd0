from __future__ import annotations

import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.records import Labeled


def test_a_verdict_goes_with_its_row(making, talk):
    row = making.row("labeled", Labeled(talk("q", "a"), desirable=True))
    assert (making.text(row.answer_ids), row.desirable) == ("a<|im_end|>", True)


def test_a_record_without_a_verdict_is_dropped(making, talk):
    with pytest.raises(BadRow, match="no verdict"):
        making.row("labeled", talk("q", "a"))


def test_an_empty_answer_is_not_judged(making, talk):
    with pytest.raises(BadRow, match="an answer is empty"):
        making.row("labeled", Labeled(talk("why?", ""), desirable=False))
