from __future__ import annotations

from dataclasses import replace

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import Reading, convert
from raytune_llm.data.templates.tool_calls import name_and_arguments
from raytune_llm.errors import ConfigError
from raytune_llm.records import Conversation


def format_of(name, **columns):
    overrides = [f"data.format.{column}={name}" for column, name in columns.items()]
    return load_config("prepare", ["model=tiny_random", f"data={name}", "data.path=rows.jsonl", *overrides]).data.format


CHAT, ALPACA = format_of("chat"), format_of("alpaca")
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def turns(row, format=CHAT):
    return [(message.role, message.content, message.trained) for message in convert(row, format).messages]


def test_every_answer_of_a_chat_is_trained():
    row = {"messages": [{"role": "system", "content": "be"}, USER, ANSWER, USER, ANSWER]}
    assert [trained for _, _, trained in turns(row)] == [False, False, True, False, True]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_an_answer_can_be_left_out_of_training(flag):
    row = {"messages": [USER, ANSWER | flag, USER, ANSWER]}
    assert [trained for _, _, trained in turns(row)] == [False, False, False, True]


@pytest.mark.parametrize("name", ["chat", "openai", "sharegpt"])
def test_an_answer_says_how_much_it_counts(name):
    human, gpt = ("from", "value"), ("human", "gpt")
    role, content, asked, answered = (*human, *gpt) if name == "sharegpt" else ("role", "content", "user", "assistant")
    flags = [{}, {"weight": 0.5}, {"train": True, "weight": 3}, {"train": False, "weight": 1}, {"loss_weight": 0}]
    column = [message for flag in flags for message in ({role: asked, content: "q"}, {role: answered, content: "a", **flag})]
    row = {"conversations" if name == "sharegpt" else "messages": column}
    answers = convert(row, format_of(name)).messages[1::2]
    assert [message.weight if message.trained else 0 for message in answers] == [1.0, 0.5, 3.0, 0, 0]
    with pytest.raises(BadRow, match="a message's weight must be true, false or a number"):
        convert({next(iter(row)): [column[0], {**column[1], "weight": "1"}]}, format_of(name))


def test_tool_calls_are_taken_in_both_their_forms():
    wrapped = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [wrapped]}], "tools": '[{"name": "add"}]'}
    conversation = convert(row, CHAT)
    assert [name_and_arguments(call) for call in conversation.messages[1].tool_calls] == [("add", {"a": 1})]
    assert conversation.tools == ({"name": "add"},)


def test_an_alpaca_row_joins_its_input_on_a_new_line():
    assert turns({"instruction": "add", "input": "1 2", "output": "3"}, ALPACA) == [
        ("user", "add\n1 2", False),
        ("assistant", "3", True),
    ]


def test_an_alpaca_row_with_empty_input_is_its_instruction():
    assert turns({"instruction": "hi", "input": "", "output": "yes"}, ALPACA)[0] == ("user", "hi", False)


def test_an_alpaca_row_brings_system_and_history():
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert turns(row, ALPACA) == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "hi"}, "there is no column 'messages'"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": "hi"}, "must be a list of messages"),
        ({"messages": None}, "must be a list of messages"),
        ({"messages": [USER, ANSWER | {"weight": -0.5}]}, "weight must be true, false or a number that is not negative"),
        ({"messages": [USER, {"role": "model", "content": "x"}]}, "role must be one of"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content must be text"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "system message must come first"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments must be a JSON object"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools must be a JSON list"),
        ([1], "a row must be an object"),
    ],
)
def test_a_chat_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, CHAT)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "hi"}, "there is no column 'output'"),
        ({"instruction": 5, "output": "x"}, "instruction must be text"),
        ({"instruction": "hi", "output": "x", "history": [["a"]]}, "history must be a list"),
        ({"instruction": "hi", "output": "x", "history": 7}, "history must be a list"),
    ],
)
def test_an_alpaca_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, ALPACA)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"from": ["gpt"], "value": "yes"}, "message's from must be one of human, observation"),
        ({"from": "function_call", "value": "[]"}, "a message of tool calls holds none"),
    ],
)
def test_a_sharegpt_message_that_cannot_be_used_says_why(message, reason):
    with pytest.raises(BadRow, match=reason):
        convert({"conversations": [{"from": "human", "value": "hi"}, message]}, format_of("sharegpt"))


def test_a_missing_column_names_those_that_exist():
    with pytest.raises(BadRow) as caught:
        convert({"question": "?", "answer": "!"}, CHAT)
    assert caught.value.detail == "there are question, answer"


@pytest.mark.parametrize(
    ("mark", "weight"),
    [
        ({"loss": False}, 0), ({"loss": True}, 1), ({"training": False}, 0), ({"trainable": 0}, 0), ({"loss_scale": 0.5}, 0.5),
        ({"step_loss_mask": 0}, 0), ({"loss_mask": 1}, 1), ({"masked": True}, 0), ({"masked": False}, 1), ({"loss": None}, 1),
        ({"loss": True, "weight": 2}, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["chat", "openai"])
def test_other_programs_marks_of_what_is_trained_are_read(name, mark, weight):
    answer = convert({"messages": [USER, ANSWER | mark]}, format_of(name)).messages[1]
    assert (answer.weight if answer.trained else 0) == weight


@pytest.mark.parametrize("mark", ["mask", "train_detail", "train_on", "no_loss"])
def test_marks_of_which_nobody_knows_the_meaning_are_refused(mark):
    with pytest.raises(BadRow, match=f"a message's {mark} is not read"):
        convert({"messages": [USER, ANSWER | {mark: [1]}]}, CHAT)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({}, {"prompt": "hi", "completion": "yes"}),
        ({"chosen": "chosen", "rejected": "rejected"}, {"prompt": [USER], "chosen": "yes", "rejected": "no"}),
        ({"label": "label"}, {"prompt": "hi", "completion": [ANSWER], "label": True}),
    ],
)
@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]', ['{"name": "add"}']])
def test_tools_beside_a_prompt_and_its_completion_are_read(columns, row, tools):
    record = convert({**row, "tools": tools, "images": ["a.png"]}, format_of("prompt_completion", **columns))
    conversation = getattr(record, "prompt", None) or getattr(record, "conversation", record)
    assert conversation.tools == ({"name": "add"},) and conversation.media.images == ("a.png",)


def test_images_within_a_prompt_or_a_side_are_not_lost():
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    prompt = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    answered = convert({"prompt": prompt, "completion": "A cat."}, format_of("prompt_completion"))
    side = {"role": "assistant", "content": [image, {"type": "text", "text": "This."}]}
    pair = convert(
        {"messages": [USER], "chosen": side, "rejected": "no"}, format_of("chat", chosen="chosen", rejected="rejected")
    )
    assert answered.media.images == pair.prompt.media.images == ("a.png",)


def test_an_image_may_be_given_as_a_data_url(tmp_path):
    url = "data:image/png;base64," + "A" * 10_000
    row = {"messages": [USER, ANSWER], "images": [url]}
    assert convert(row, CHAT, Reading(media_dir=str(tmp_path))).media.images == (url,)


@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize("value", [10**400, 1e39, -1, float("inf"), "7"])
def test_a_number_that_float32_has_not_makes_a_bad_row(name, value):
    row = {"messages": [USER], "chosen": ANSWER | {"weight": value}, "rejected": "no", "margin": 1}
    if name == "margin":
        row = {"messages": [USER], "chosen": "yes", "rejected": "no", "margin": value}
    with pytest.raises(BadRow):
        convert(row, replace(CHAT, chosen="chosen", rejected="rejected", margin="margin"))


@pytest.mark.parametrize("history", [0, False, {}, 7, "q", {"a": 1}, [1], [["a"]], [["a", "b", "c"]], [["a", 1]], ["ab"]])
def test_a_history_of_a_wrong_type_makes_a_bad_row(history):
    with pytest.raises(BadRow):
        convert({"instruction": "a", "output": "b", "history": history}, ALPACA)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"chosen": "a", "rejected": "b", "label": "c"}, "data.format.label must be null if data.format.chosen is given"),
        ({"chosen": "a"}, "data.format.rejected must be given if data.format.chosen is"),
        ({"rejected": "a"}, "data.format.chosen must be given if data.format.rejected is"),
    ],
)
@pytest.mark.parametrize("name", ["chat", "alpaca", "sharegpt", "openai", "prompt_completion"])
def test_rows_are_pairs_or_have_a_verdict(name, columns, said):
    with pytest.raises(ConfigError, match=said):
        format_of(name, **columns)


def test_a_thought_has_one_text():
    row = {"messages": [USER, ANSWER | {"reasoning": "a", "reasoning_content": "b"}]}
    with pytest.raises(BadRow, match="a message has several fields of reasoning"):
        convert(row, CHAT)


def test_the_result_of_a_function_call_is_one_of_a_tool():
    call = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    record = convert({"messages": [USER, call, {"role": "function", "name": "add", "content": "1"}, ANSWER]}, CHAT)
    assert isinstance(record, Conversation)
    result = record.messages[2]
    assert (result.role, result.written) == ("tool", {"role": "tool", "name": "add", "content": "1"})


def test_images_within_messages_are_left_out_where_they_are_not_to_be_read():
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    with_images, without = convert(row, CHAT), convert(row, replace(CHAT, images=None))
    assert isinstance(with_images, Conversation) and isinstance(without, Conversation)
    assert (with_images.messages[0].content, len(with_images.media.images)) == ("see<image>", 1)
    assert (without.messages[0].content, without.media.images) == ("see", ())


@pytest.mark.parametrize("calls", [7, "add", [None], [{"name": 7}]])
def test_calls_of_a_wrong_type_are_a_bad_row_where_only_the_template_reads_them_too(calls):
    turns = [{"from": "human", "value": "a", "tool_calls": calls}, {"from": "gpt", "value": "b"}]
    with pytest.raises(BadRow):
        convert({"conversations": turns}, format_of("sharegpt"))
