from __future__ import annotations

import numpy as np
import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.records import Message, Pair


def pair(conversation, chosen, rejected, margin=0.0):
    chosen, rejected = ((Message("assistant", text, trained=True),) for text in (chosen, rejected))
    return Pair(conversation, chosen, rejected, margin)


def test_a_pair_has_one_prompt_two_answers_and_a_margin(making, talk):
    row = making.row("pairs", pair(talk("q"), "good", "bad", 0.5))
    assert making.text(row.prompt_ids).endswith("<|im_start|>assistant\n")
    assert [making.text(ids) for ids in (row.chosen_ids, row.rejected_ids)] == ["good<|im_end|>", "bad<|im_end|>"]
    assert row.margin == 0.5


def test_a_pair_that_is_too_long_keeps_both_answers(making, talk):
    row = making.row("pairs", pair(talk("q" * 100), "a" * 30, "b" * 30), max_length=80)
    assert len(row.prompt_ids) + len(row.chosen_ids) == 80
    assert len(row.chosen_ids) == len(row.rejected_ids) == 31


def test_a_record_of_another_kind_is_dropped(making, talk):
    with pytest.raises(BadRow, match="not a pair of answers"):
        making.row("pairs", talk("q", "a"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("so", "so", "both answers are the same"), ("so", " ", "an answer is empty"), ("", "so", "an answer is empty")],
)
def test_pairs_need_two_answers_that_differ(making, talk, chosen, rejected, reason):
    with pytest.raises(BadRow, match=reason):
        making.row("pairs", pair(talk("why?"), chosen, rejected))


def test_the_answer_to_a_prompt_is_the_chosen_one():
    ids = np.arange(10)
    prompt, answer = KINDS["pairs"].prompt_and_answer(PairRow(ids[:2], ids[2:4], ids[4:]))
    assert (prompt.tolist(), answer.tolist()) == ([0, 1], [2, 3])
