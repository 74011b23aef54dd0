from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow, targets_of_spans
from raytune_llm.data.templates.named import apply_to_tokenizer, load
from raytune_llm.data.templates.named_chat import NamedChat
from raytune_llm.data.tokens.tokenize import BlockTokenizer, Tokens
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.data.tokens.truncation import shorten
from raytune_llm.records import Conversation, Labeled, Media, Message

CONVERSATIONS = KINDS["conversations"]


def trained_texts(making, row):
    return [making.text(row.ids[start:end]) for start, end in np.reshape(row.spans, (-1, 2)).tolist()]


def test_every_answer_is_trained_or_only_the_last_or_everything(making, talk):
    record = talk("a", "b", "c", "d")
    assert trained_texts(making, making.row("conversations", record)) == ["b<|im_end|>", "d<|im_end|>"]
    assert trained_texts(making, making.row("conversations", record, mask_history=True)) == ["d<|im_end|>"]
    everything = making.row("conversations", record, train_on_prompt=True)
    assert everything.spans.tolist() == [0, len(everything.ids)]


def weighted(*weights):
    """An answer of each weight; 0 is not trained."""
    answers = [Message("assistant", "ab"[n % 2], trained=weight > 0, weight=weight) for n, weight in enumerate(weights)]
    return Conversation(tuple(message for answer in answers for message in (Message("user", "q"), answer)))


@pytest.mark.parametrize("end_of_row", [None, 0])
def test_the_weight_of_an_answer_goes_with_its_span(making, end_of_row):
    row = making.row("conversations", weighted(0.5, 0.0, 2.0, 1.0), end_of_row=end_of_row)
    assert (len(row.spans), list(row.weights)) == (6, [0.5, 2.0, 1.0])
    assert list(making.row("conversations", weighted(1.0, 0.0), end_of_row=end_of_row).weights) == []
    last = making.row("conversations", weighted(0.5, 0.25), end_of_row=end_of_row, mask_history=True)
    assert (len(last.spans), list(last.weights)) == (2, [0.25])


def test_an_answer_that_says_nothing_is_its_end(making, talk):
    tokenizer, template = byte_tokenizer(), load("bailing")
    apply_to_tokenizer(tokenizer, template)
    renderer = NamedChat(template, tokenizer, enable_thinking=None, preserve_thinking=False)
    targets = replace(making.targets, end_of_row=tokenizer.convert_tokens_to_ids(renderer.end_of_row))
    rendered = CONVERSATIONS.render(talk("q", ""), renderer, targets)
    row = CONVERSATIONS.make(talk("q", ""), rendered, BlockTokenizer(tokenizer)(rendered), targets)
    assert row.spans.tolist() == [len(row.ids) - 1, len(row.ids)]


def test_a_record_of_another_kind_is_dropped(making, talk):
    with pytest.raises(BadRow, match="not a plain conversation"):
        making.row("conversations", Labeled(talk("q", "a"), desirable=True))


def test_a_conversation_without_an_answer_is_dropped(making, talk):
    with pytest.raises(BadRow, match="no answer to learn"):
        making.row("conversations", talk("q"))


def test_rows_with_images_are_refused(making, talk):
    with pytest.raises(RefusedRow, match="images"):
        making.row("conversations", replace(talk("q", "a"), media=Media(images=("cat.jpg",))))


@pytest.mark.parametrize(("end_of_row", "length"), [(None, 72), (0, 73)])
def test_overlong_rows_can_be_dropped_or_refused(making, talk, end_of_row, length):
    record = talk("q" * 50, "a")
    with pytest.raises(BadRow, match="longer than"):
        making.row("conversations", record, max_length=20, overlong="drop", end_of_row=end_of_row)
    with pytest.raises(RefusedRow, match=rf"has {length} tokens, data\.max_length is 20"):
        making.row("conversations", record, max_length=20, overlong="error", end_of_row=end_of_row)


def test_a_row_with_no_trained_token_left_is_dropped(making, talk):
    with pytest.raises(BadRow, match="no trained token is left after truncation"):
        making.row("conversations", talk("q", "a"), max_length=1)


lengths = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6)


@given(lengths=lengths, budget=st.integers(0, 120), last_first=st.booleans())
def test_truncation_keeps_the_start_of_each_part_within_the_budget(lengths, budget, last_first):
    ends = np.cumsum([length for turn in lengths for length in turn])
    answers = np.stack([ends[0::2], ends[1::2]], axis=1).reshape(-1).astype(np.int32)
    kept = shorten(Tokens(np.arange(ends[-1], dtype=np.int32), answers), budget, last_first=last_first)
    assert len(kept.ids) <= budget
    assert np.all(np.diff(kept.ids) > 0)
    for start, (first, last) in zip(answers[0::2], kept.answers.reshape(-1, 2).tolist(), strict=True):
        assert kept.ids[first:last].tolist() == list(range(start, start + last - first))


@given(st.lists(st.lists(st.integers(0, 9), max_size=6).map(lambda cuts: sorted(set(cuts))[: len(set(cuts)) // 2 * 2])))
def test_targets_of_flat_spans_are_those_of_each_row(spans):
    offsets = np.cumsum([0, *map(len, spans)])
    flat = np.array([value for row in spans for value in row], dtype=np.int32)
    assert targets_of_spans(offsets, flat).tolist() == [
        sum(end - max(start, 1) for start, end in zip(row[::2], row[1::2], strict=True)) for row in spans
    ]


def test_the_prompt_ends_before_the_last_answer():
    prompt, answer = CONVERSATIONS.prompt_and_answer(ConversationRow(np.arange(10), np.array([2, 4, 6, 9])))
    assert (prompt.tolist(), answer.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
