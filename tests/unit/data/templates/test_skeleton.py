"""Conversations that are filled into a form have the text and the answers of those that are rendered."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.templates.control_tokens import CUT, placeholder, unescape
from raytune_llm.data.templates.named import apply_to_tokenizer, load, names
from raytune_llm.data.templates.named_chat import NamedChat
from raytune_llm.data.templates.skeleton import Skeleton
from raytune_llm.data.tokens.tokenizer import CHATML, byte_tokenizer
from raytune_llm.records import Conversation, Message

words = ["", " ", "\n", "a", "hey ", "é", "1", "{{ messages }}", "\ufdd3", "system", "/no_think", "<tool_response>"]
thoughts = ["<think>", "</think>", "<think>\n", "\n</think>\n\n", "hm", "<|channel>thought\n"]
contents = st.lists(st.sampled_from([*words, *thoughts]), max_size=4).map("".join)
messages = st.builds(Message, st.sampled_from(["user", "tool", "assistant"]), contents, st.booleans())
systems = st.lists(st.builds(Message, st.just("system"), contents), max_size=1)
conversations = st.builds(
    lambda system, turns, last: Conversation((*system, *turns, Message("assistant", last, trained=True))),
    systems,
    st.lists(messages, max_size=5),
    contents,
)


@lru_cache
def named(name, thinking, preserve):
    tokenizer = byte_tokenizer()
    template = load(name)
    apply_to_tokenizer(tokenizer, template)
    return tokenizer, NamedChat(template, tokenizer, enable_thinking=thinking, preserve_thinking=preserve)


@pytest.mark.parametrize("name", names())
@settings(max_examples=25)
@given(chat=conversations, thinking=st.sampled_from([True, False, None]), preserve=st.booleans(), earlier=st.booleans())
def test_a_named_template_gives_what_rendering_gives(name, chat, thinking, preserve, earlier):
    tokenizer, template = named(name, thinking, preserve)
    rendering: Any = render_jinja_template(
        [[{"role": message.role, "content": message.content} for message in chat.messages]],
        chat_template=template.template.source,
        return_assistant_tokens_mask=True,
        enable_thinking=thinking,
        preserve_thinking=preserve,
        train_history=earlier,
        cut=CUT,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    (text,), (spans,) = rendering
    expected = unescape(text, [], [position for span in spans for position in span])
    rendered = template.render(chat, earlier_answers=earlier)
    assert rendered.text == expected.text
    assert [position for answer in rendered.answers for position in answer] == list(expected.positions)
    assert rendered.cuts == expected.cuts


def turns(content, before=""):
    """ChatML with something else in place of a message's content, and before a turn."""
    return (
        f"{{% for m in messages %}}{before}<|im_start|>{{{{ m.role }}}}\n{{{{ {content} }}}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TEMPLATES = {
    "as it is": CHATML,
    "strips": turns("m.content | trim"),
    "tests contents": turns("'nothing' if 'hey' in m.content else m.content"),
    "drops earlier thoughts": turns("m.content if loop.last else m.content.split('</think>')[-1]"),
    "writes it twice": turns("m.content ~ m.content"),
    "leaves empty turns out": turns("m.content", before="{% if not m.content %}{% continue %}{% endif %}"),
    "rewrites earlier turns": turns("m.content if m.role == 'user' or loop.last else '...'"),
    "looks at the last": "{{ messages[-1].content | length }}" + turns("m.content"),
    "refuses": "{% if 'hey' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + turns("m.content"),
    "asks otherwise later": turns("m.content") + "{{ '!' if add_generation_prompt and messages | length > 2 }}",
    "reads a switch": "{{ '<|pad|>' if messages[0].content.endswith('/no_think') }}" + turns("m.content"),
}


LOSES_CONTENTS = ("tests contents", "drops earlier thoughts", "rewrites earlier turns")


@lru_cache
def own(name):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer, ChatTemplate(tokenizer)


def by_prefixes(tokenizer, chat):
    """The text and the answers' starts, found the long way, or why there are none."""
    plain = [{"role": message.role, "content": message.content} for message in chat.messages]

    def rendered(messages, asks):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks) if messages else ""

    try:
        text = rendered(plain, False)
    except TemplateError:
        return BadRow
    starts = []
    for turn, message in enumerate(chat.messages):
        if message.role == "assistant":
            before, through = rendered(plain[:turn], True), rendered(plain[: turn + 1], False)
            if text.startswith(before) and text.startswith(through) and len(through) > len(before):
                starts.append(len(before))
            elif message.trained:
                return RefusedRow
    return text, starts


@pytest.mark.parametrize("name", TEMPLATES)
@example(chat=Conversation((Message("user", "a"), Message("assistant", "hey", trained=True))))  # as long as a placeholder
@given(chat=conversations)
def test_a_tokenizers_own_template_gives_what_rendering_every_prefix_gives(name, chat):
    tokenizer, template = own(name)
    expected = by_prefixes(tokenizer, chat)
    if isinstance(expected, type):
        with pytest.raises(expected):
            template.render(chat)
        return
    with suppress(BadRow, RefusedRow) if name in LOSES_CONTENTS else nullcontext():
        rendered = template.render(chat)
        assert (rendered.text, [start for start, _ in rendered.answers]) == expected


def test_a_form_keeps_what_lies_beside_a_content():
    text = f"[{placeholder(0)}]{CUT}({placeholder(1)}){CUT}"
    form = Skeleton.of(text, [1, text.index("]"), text.index(CUT) + 1, len(text)])
    assert form.fill(["ab", ""]) == ("[ab]()", [1, 3, 4, 6], [4, 6])


def test_a_form_may_write_a_content_twice_or_not_at_all():
    assert Skeleton.of(f"{placeholder(1)}, {placeholder(1)}", [0]).fill(["a", "b"]) == ("b, b", [0], [])
