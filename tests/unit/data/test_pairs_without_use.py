"""Pairs and verdicts that teach nothing are counted, not trained on."""

from __future__ import annotations

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.data import pipeline
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.rows import KINDS
from raytune_llm.records import Conversation, Labeled, Message, Pair

ASKED = Conversation((Message("user", "why?"),))


@pytest.fixture(scope="module")
def render():
    run = load_config("prepare", ["model=tiny_random", "data.path=rows.jsonl"])
    preprocessor = pipeline._preprocessor(run.model, run.data, "pairs")
    return lambda kind, record: KINDS[kind].render(record, preprocessor.renderer, preprocessor.targets)


def said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text, trained=True),)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("so", "so", "both answers are the same"), ("so", " ", "an answer is empty"), ("", "so", "an answer is empty")],
)
def test_pairs_need_two_answers_that_differ(render, chosen, rejected, reason):
    with pytest.raises(BadRow, match=reason):
        render("pairs", Pair(ASKED, said(chosen), said(rejected)))


def test_an_empty_answer_is_not_judged(render):
    with pytest.raises(BadRow, match="an answer is empty"):
        render("labeled", Labeled(Conversation((*ASKED.messages, *said(""))), desirable=False))
