from __future__ import annotations

import pytest

from raytune_llm.data.dropped import BadRow, Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import Rows
from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.store import map_shard, write_shard
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


@pytest.mark.parametrize(("verdicts", "said"), [((True, False), None), ((True, True), "good"), ((False,), "bad")])
def test_verdicts_that_are_all_the_same_are_remarked_on(tmp_path, verdicts, said):
    kind = KINDS["labeled"]
    rows = [LabeledRow([1], [2, 3], verdict) for verdict in verdicts]
    write_shard(tmp_path / "shard", rows, Dropped(), kind=kind)
    remarks = kind.remarks(Rows(kind, None, [map_shard(tmp_path / "shard")]))
    assert remarks == () if said is None else f"every answer is a {said} one" in remarks[0]
