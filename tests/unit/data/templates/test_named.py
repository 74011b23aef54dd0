from __future__ import annotations

import json

import jinja2
import jinja2.meta
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from raytune_llm.data.templates.named import MODELS, apply_to_tokenizer, guess, load, names, stop_tokens
from raytune_llm.data.templates.tool_calls import (
    CALL_WORDS,
    EXTRACTORS,
    beside_calls,
    extract_calls,
    parse_call_turn,
    render_calls,
    render_tools,
)
from raytune_llm.errors import ConfigError

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def render(name, messages, *, tool_format=None, default_system=None, date=None, **settings):
    template = load(name, tool_format=tool_format, default_system=default_system, date=date)
    return render_jinja_template([messages], chat_template=template.source, **settings)[0][0]


def user(text):
    return {"role": "user", "content": text}


def answer(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def tokenizer(**special):
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", "hello"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), **special)


@pytest.mark.parametrize("name", names())
def test_the_prompt_is_a_prefix_of_the_whole_for_every_template(name):
    messages = [{"role": "system", "content": "S"}, user("u1"), answer("a1"), user("u2"), answer("a2")]
    settings = {"train_history": True, "bos_token": "<s>", "eos_token": "</s>"}
    whole = render(name, messages, **settings)
    for turn in (2, 4):
        assert whole.startswith(render(name, messages[:turn], add_generation_prompt=True, **settings))


@pytest.mark.parametrize("name", names())
def test_every_template_renders_tools_calls_and_parallel_results(name):
    calls = [CALL] if load(name).tool_format == "glm4" else [CALL, CALL]
    results = [{"role": "tool", "content": f"result {i}"} for i in range(len(calls))]
    text = render(name, [user("u"), answer("", tool_calls=calls), *results, answer("done")], tools=[TOOL], eos_token="</s>")
    assert "add" in text
    assert all(result["content"] in text for result in results)
    assert text.index("result 0") < text.index("done")


@pytest.mark.parametrize("name", names())
def test_a_source_needs_no_other_file(name):
    assert not list(jinja2.meta.find_referenced_templates(jinja2.Environment().parse(_without_marks(load(name).source))))


def _without_marks(source):
    return source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def test_parallel_results_of_one_turn_stand_in_one_user_turn_of_qwen():
    messages = [
        user("u"),
        answer("", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = render("qwen", messages)
    assert "user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n" in text


def test_reasoning_given_apart_from_the_text_becomes_a_thought():
    text = render("qwen3", [user("u"), answer("4", reasoning_content="2+2")])
    assert text.endswith("<think>\n2+2\n</think>\n\n4<|im_end|>\n")


def test_what_a_user_types_is_never_taken_for_a_placeholder():
    typed = "{{idx}} {{content}} {% raw %} {{ messages }}"
    assert typed in render("qwen", [user(typed)])


def test_a_system_text_of_the_conversation_wins_over_the_default():
    assert "D" not in render("alpaca", [{"role": "system", "content": "S"}, user("u")], default_system="D")
    assert render("alpaca", [user("u")], default_system="D").startswith("D### Instruction")
    assert render("alpaca", [user("u")], default_system="").startswith("### Instruction")


def test_a_default_system_text_survives_quotes_and_newlines():
    system = 'say "a\\b"\n{{ no }} 🙂 \\n\r'
    assert render("chatml", [user("u")], default_system=system).startswith(f"<|im_start|>system\n{system}<|im_end|>")


def test_the_date_is_a_setting():
    assert "Today Date: 01 Feb 2026" in render("llama3", [user("u")], tools=[TOOL], date="01 Feb 2026")
    assert render("llama3", [user("u")], tools=[TOOL]) == render("llama3", [user("u")], tools=[TOOL], date="26 Jul 2024")


def test_another_tool_format_keeps_the_templates_own_slots():
    text = render("chatml", [user("u"), answer("", tool_calls=[CALL])], tools=[TOOL], tool_format="qwen")
    assert text.endswith('<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n')


def test_a_late_system_message_is_refused():
    with pytest.raises(jinja2.TemplateError, match="role"):
        render("chatml", [user("u"), {"role": "system", "content": "S"}])


def test_gpt_oss_calls_go_into_the_commentary_channel():
    text = render("gpt_oss", [user("u"), answer("", reasoning_content="hm", tool_calls=[CALL])], tools=[TOOL])
    thought = "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
    assert text.endswith(thought + '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"x": 1}<|call|>')


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match="qwen2_vl"):
        load("qwen2vl")
    with pytest.raises(ConfigError, match=r"data\.tool_format"):
        load("qwen", tool_format="qwne")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_nothink"),
        ("/models/Meta-Llama-3.1-8B-Instruct/", "llama3"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "mllama"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseekr1"),
        ("deepseek-ai/DeepSeek-V3", "deepseek3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("HuggingFaceH4/zephyr-7b-beta", "zephyr"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("google/gemma-2b-it", "gemma"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi"),
        ("zai-org/GLM-4.5-Air", "glm4_moe"),
        ("qwen3_vl", "qwen3_vl"),
        ("glm4_moe", "glm4_moe"),
        ("openlm-research/open_llama_3b", None),
        ("llama", None),
        ("gpt2", None),
    ],
)
def test_the_template_is_guessed_from_the_models_name(model, name):
    assert guess(model) == name


def test_every_guess_is_a_template():
    assert {name for _, name in MODELS} <= set(names())


def test_the_first_stop_token_becomes_the_end_token():
    taught = tokenizer(eos_token="</s>")
    assert apply_to_tokenizer(taught, load("chatml")) == ("<|im_end|>", "<|im_start|>")
    assert (taught.eos_token, taught.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert stop_tokens(taught, load("chatml")) == ("<|im_end|>", "<|im_start|>")
    assert taught.chat_template == load("chatml").source


def test_other_stop_tokens_are_added_beside_the_end_token():
    taught = tokenizer(eos_token="</s>", pad_token="<unk>")
    assert apply_to_tokenizer(taught, load("glm4")) == ("<|observation|>", "<|user|>")
    assert (taught.eos_token, taught.pad_token) == ("</s>", "<unk>")
    assert set(stop_tokens(taught, load("glm4"))) == {"</s>", "<|observation|>", "<|user|>"}


def test_a_tokenizer_without_an_end_token_gets_one():
    taught = tokenizer()
    assert apply_to_tokenizer(taught, load("vicuna")) == ("<|endoftext|>",)
    assert taught.pad_token == "<|endoftext|>"


def test_control_tokens_hold_the_marks_of_turns_and_stops_longest_first():
    tokens = load("chatml").control_tokens
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokens)
    assert {"[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"} <= set(load("mistral").control_tokens)
    assert {"<think>", "</think>", "<tool_response>"} <= set(load("qwen3").control_tokens)
    assert list(tokens) == sorted(tokens, key=lambda token: -len(token))
    assert load("alpaca", tool_format="default").control_tokens == ()


@pytest.mark.parametrize("tool_format", EXTRACTORS)
def test_calls_can_be_read_back(tool_format):
    calls = [{"name": "add", "arguments": {"x": 1, "s": 'a "b"\nc, d: e', "l": [True, None, {"k": "v"}]}}]
    read = extract_calls(tool_format, render_calls(tool_format, calls))
    assert isinstance(read, list)
    assert [(call.name, json.loads(call.arguments)) for call in read] == [("add", calls[0]["arguments"])]


def test_a_tool_without_parameters_can_be_declared():
    for tool_format in EXTRACTORS:
        assert "now" in render_tools(tool_format, [{"name": "now", "description": "The time."}])


def test_gemma4_declares_parameters_in_their_order_and_only_the_types_they_have():
    properties = {"zone": {"description": "Which?"}, "at": {"type": "string"}}
    declared = render_tools("gemma4", [{"name": "now", "description": "Time.", "parameters": {"properties": properties}}])
    time, zone, at = '<|"|>Time.<|"|>', '<|"|>Which?<|"|>', '<|"|>STRING<|"|>'
    parameters = f"{{zone:{{description:{zone}}},at:{{type:{at}}}}}"
    assert declared == f"declaration:now{{description:{time},parameters:{{properties:{parameters}}}}}"


def test_items_of_no_kind_are_not_declared():
    parameters = {"properties": {"x": {"type": "array", "items": {}}}}
    assert "  - x (array): \n" in render_tools("default", [{"name": "f", "description": "", "parameters": parameters}])


def test_line_separators_in_arguments_are_text():
    calls = [{"name": "add", "arguments": {"s": "a\u2028b"}}]
    assert extract_calls("minimax1", render_calls("minimax1", calls)) == [("add", '{"s": "a\u2028b"}')]


def test_a_system_text_is_left_out_where_no_user_opens_the_conversation():
    messages = [{"role": "system", "content": "S"}, {"role": "tool", "content": "7"}, answer("a")]
    assert render("ministral", messages, bos_token="", eos_token="") == '[TOOL_RESULTS]{"content": 7}[/TOOL_RESULTS]a'


def test_a_turn_with_two_wrapped_calls_keeps_both():
    one, two = '{"name": "a", "arguments": {}}', '{"name": "b", "arguments": "{}"}'
    text, calls = parse_call_turn(f"Hm. <tool_call>{one}</tool_call><tool_call>{two}</tool_call>")
    assert (text, [call["name"] for call in calls]) == ("Hm. ", ["a", "b"])


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ('<|tool_call_start|>add(x=1)<|tool_call_end|>', ["add"]),
        ('<|tool_call_start|> [add(x=1)] <|tool_call_end|>', ["add"]),
        ('<|tool_call_start|>add(x=1), now()<|tool_call_end|>', ["add", "now"]),
        ('<|tool_call_start|>[add(x=1)]<|tool_call_end|> and <|tool_call_start|>now()<|tool_call_end|>', ["add", "now"]),
        ('<|tool_call_start|>add<|tool_call_end|>', None),
        ('<|tool_call_start|>add(x=1), 7<|tool_call_end|>', None),
    ],
)  # fmt: skip
def test_lfm2_calls_are_read_with_and_without_brackets(written, names):
    read = extract_calls("lfm2", written)
    assert read == written if names is None else [call.name for call in read] == names


@pytest.mark.parametrize("tool_format", sorted(CALL_WORDS))
def test_what_is_said_beside_a_call_is_kept(tool_format):
    call = render_calls(tool_format, [{"name": "add", "arguments": {"x": 1}}])
    assert beside_calls(tool_format, f"Let me see. {call} Done.").split() == ["Let", "me", "see.", "Done."]
    assert parse_call_turn('<tool_call>{"name": "a", "arguments": {}}</tool_call> Done.')[0] == " Done."
