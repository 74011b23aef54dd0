from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.rows import KINDS, Targets
from raytune_llm.data.templates.named import apply_to_tokenizer, load
from raytune_llm.data.templates.render import ChatTemplate, NamedChat, PlainText
from raytune_llm.data.tokens.tokenize import BlockTokenizer, Tokens
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.data.tokens.truncation import shorten
from raytune_llm.records import Conversation, Labeled, Media, Message, Pair, Text

TOKENIZER = byte_tokenizer()
TEMPLATE, TOKENIZE = ChatTemplate(TOKENIZER), BlockTokenizer(TOKENIZER)
TARGETS = Targets(max_length=1000, overlong="truncate")


def conversation(*texts):
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], text, trained=n % 2 == 1) for n, text in enumerate(texts)))  # type: ignore[arg-type]


def row_of(kind, record, targets=TARGETS, renderer=TEMPLATE):
    rendered = KINDS[kind].render(record, renderer, targets)
    return KINDS[kind].row(record, rendered, TOKENIZE(rendered), targets)


def trained_texts(row):
    return [TOKENIZER.decode(row.ids[start:end]) for start, end in np.reshape(row.spans, (-1, 2)).tolist()]


def test_every_answer_is_trained_or_only_the_last_or_everything():
    talk = conversation("a", "b", "c", "d")
    assert trained_texts(row_of("conversations", talk)) == ["b<|im_end|>", "d<|im_end|>"]
    assert trained_texts(row_of("conversations", talk, replace(TARGETS, mask_history=True))) == ["d<|im_end|>"]
    everything = row_of("conversations", talk, replace(TARGETS, train_on_prompt=True))
    assert everything.spans.tolist() == [0, len(everything.ids)]


def weighted(*weights):
    """An answer of each weight; 0 is not trained."""
    answers = [Message("assistant", "ab"[n % 2], trained=weight > 0, weight=weight) for n, weight in enumerate(weights)]
    return Conversation(tuple(message for answer in answers for message in (Message("user", "q"), answer)))


@pytest.mark.parametrize("end_of_row", [None, 0])
def test_the_weight_of_an_answer_goes_with_its_span(end_of_row):
    targets = replace(TARGETS, end_of_row=end_of_row)
    row = row_of("conversations", weighted(0.5, 0.0, 2.0, 1.0), targets)
    assert (len(row.spans), list(row.weights)) == (6, [0.5, 2.0, 1.0])
    assert list(row_of("conversations", weighted(1.0, 0.0), targets).weights) == []
    last = row_of("conversations", weighted(0.5, 0.25), replace(targets, mask_history=True))
    assert (len(last.spans), list(last.weights)) == (2, [0.25])


def test_an_answer_that_says_nothing_is_its_end():
    tokenizer, template = byte_tokenizer(), load("bailing")
    apply_to_tokenizer(tokenizer, template)
    renderer = NamedChat(template, tokenizer, enable_thinking=None, preserve_thinking=False)
    targets = replace(TARGETS, end_of_row=tokenizer.convert_tokens_to_ids(renderer.end_of_row))
    rendered = KINDS["conversations"].render(conversation("q", ""), renderer, targets)
    row = KINDS["conversations"].row(conversation("q", ""), rendered, BlockTokenizer(tokenizer)(rendered), targets)
    assert row.spans.tolist() == [len(row.ids) - 1, len(row.ids)]


def test_a_pair_has_one_prompt_and_two_answers():
    row = row_of("pairs", Pair(conversation("q"), *((Message("assistant", text, trained=True),) for text in ("good", "bad"))))
    assert TOKENIZER.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
    assert [TOKENIZER.decode(ids) for ids in (row.chosen_ids, row.rejected_ids)] == ["good<|im_end|>", "bad<|im_end|>"]


def test_a_pair_that_is_too_long_keeps_both_answers():
    pair = Pair(conversation("q" * 100), *((Message("assistant", text * 30, trained=True),) for text in "ab"))
    row = row_of("pairs", pair, replace(TARGETS, max_length=80))
    assert len(row.prompt_ids) + len(row.chosen_ids) == 80
    assert len(row.chosen_ids) == len(row.rejected_ids) == 31


def test_a_verdict_goes_with_its_row():
    row = row_of("labeled", Labeled(conversation("q", "a"), desirable=True))
    assert (TOKENIZER.decode(row.answer_ids), row.desirable) == ("a<|im_end|>", True)


def test_a_prompt_asks_for_the_answer():
    assert TOKENIZER.decode(row_of("prompts", conversation("q")).prompt_ids).endswith("<|im_start|>assistant\n")


def test_plain_text_ends_with_the_end_token_and_forges_none():
    targets = replace(TARGETS, text_end=TOKENIZER.eos_token_id)
    row = row_of("text", Text("a<|im_end|>"), targets, PlainText(TOKENIZER))
    assert row.ids.tolist() == [*b"a<|im_end|>", TOKENIZER.eos_token_id]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("conversations", conversation("q"), "no answer to learn"),
        ("conversations", Labeled(conversation("q", "a"), desirable=True), "no plain conversation"),
        ("pairs", conversation("q", "a"), "no pair of answers"),
        ("labeled", conversation("q", "a"), "no verdict"),
        ("prompts", Text("a"), "plain text"),
        ("text", Text(""), "text is empty"),
        ("text", Conversation((Message("system", "s"),)), "text is empty"),
    ],
)
def test_a_row_of_another_kind_is_dropped(kind, record, reason):
    with pytest.raises(BadRow, match=reason):
        row_of(kind, record)


def test_rows_with_images_are_refused():
    with pytest.raises(RefusedRow, match="images"):
        row_of("conversations", replace(conversation("q", "a"), media=Media(images=("cat.jpg",))))


def test_overlong_rows_can_be_dropped_or_refused():
    talk = conversation("q" * 50, "a")
    with pytest.raises(BadRow, match="longer than"):
        row_of("conversations", talk, replace(TARGETS, max_length=20, overlong="drop"))
    with pytest.raises(RefusedRow, match="max_length is 20"):
        row_of("conversations", talk, replace(TARGETS, max_length=20, overlong="error"))


def test_a_row_with_no_trained_token_left_is_dropped():
    with pytest.raises(BadRow, match="no trained token is left after truncation"):
        row_of("conversations", conversation("q", "a"), replace(TARGETS, max_length=1))


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
