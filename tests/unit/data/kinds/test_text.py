from __future__ import annotations

import numpy as np
import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.kinds.text import PROMPT_TOKENS, TextRow
from raytune_llm.data.templates.rendered import PlainText
from raytune_llm.records import Conversation, Message, Text


def row(making, record, **targets):
    return making.row("text", record, renderer=PlainText(making.tokenizer), **targets)


def test_plain_text_ends_with_the_end_token_and_forges_none(making):
    end = making.tokenizer.eos_token_id
    assert row(making, Text("a<|im_end|>"), text_end=end).ids.tolist() == [*b"a<|im_end|>", end]


@pytest.mark.parametrize("record", [Text(""), Conversation((Message("system", "s"),))])
def test_a_row_without_text_is_dropped(making, record):
    with pytest.raises(BadRow, match="text is empty"):
        row(making, record)


def test_a_text_of_one_token_has_nothing_to_learn(making):
    with pytest.raises(BadRow, match="no trained token"):
        row(making, Text("a"))


@pytest.mark.parametrize(("whole", "length"), [(True, 40), (False, 8)])
def test_a_text_is_cut_at_max_length_unless_it_is_packed_end_to_end(making, whole, length):
    assert len(row(making, Text("x" * 40), max_length=8, texts_whole=whole).ids) == length


@pytest.mark.parametrize(("length", "asked"), [(200, PROMPT_TOKENS), (9, 5), (1, 1)])
@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_what_is_trained_whole_is_asked_for_its_rest(kind, length, asked):
    ids = np.arange(length)
    whole = TextRow(ids) if kind == "text" else ConversationRow(ids, np.array([0, length]))
    prompt, rest = KINDS[kind].prompt_and_answer(whole)
    assert (len(prompt), [*prompt, *rest]) == (asked, list(range(length)))
