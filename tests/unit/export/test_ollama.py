from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.templates.named import apply_to_tokenizer, load, names
from raytune_llm.data.tokens.tokenizer import CHATML, byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.export.ollama.modelfile import Said, prompts_of, said_of, without_spaces
from raytune_llm.export.ollama.prompts import ChatTemplate
from raytune_llm.export.ollama.written import EVER, LAST, SINCE_QUESTION
from tests.go_templates import needs_go, render
from tests.llama_cpp import small_model

DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am Small.<|im_end|>\n{% endif %}"
TOOLS_WITH_QUESTION = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<sys>' ~ ('Environment: tools. ' if tools) ~ (system or 'Today is Monday.') ~ '</s>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<user>' }}
        {%- if tools and loop.first %}
            {{- 'Call one of\n\n' }}{%- for tool in tools %}{{- tool | tojson(indent=4) ~ '\n\n' }}{%- endfor %}
        {%- endif %}
        {{- message.content ~ '</s>' }}
    {%- elif message.role == 'tool' %}
        {{- '<result>' ~ message.content ~ '</s>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('one call at once') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<answer>' ~ message.content ~ '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ '}</s>' }}
    {%- else %}
        {{- '<answer>' ~ message.content ~ '</s>' }}
    {%- endif %}
{%- endfor %}
{{- '<answer>' if add_generation_prompt }}"""
"""Tools in the first question's turn, a system text that depends on them, and no parallel calls, as Llama 3.1 has it."""
THOUGHTS_SINCE_QUESTION = """\
{%- set last = namespace(question=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' }}
    {{- messages[0].content if messages[0].role == 'system' }}{{- '\n\n' if tools and messages[0].role == 'system' }}
    {%- if tools %}
        {{- '# Tools\n' }}{%- for tool in tools %}{{- '\n' ~ tool | tojson }}{%- endfor %}{{- '\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' ~ message.content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content and loop.index0 > last.question %}
            {{- '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if loop.index0 or message.content }}
            {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false }}
{%- endif %}"""
"""Thoughts of answers since the last question, shared turns of results, and a line before calls, as Qwen3 has it."""
ALWAYS_TOLD = CHATML.replace("message['content']", "(message.reasoning_content or '') + message['content']")
QUOTED_RESULTS = THOUGHTS_SINCE_QUESTION.replace(
    "~ message.content ~ '\n</tool_resp", "~ message.content | tojson ~ '\n</tool_resp"
)


def tokenizer_with(chat_template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def named(name: str) -> Any:
    tokenizer = byte_tokenizer()
    apply_to_tokenizer(tokenizer, load(name, default_system=None, tool_format=None, date=None))
    return tokenizer


def test_the_turns_of_chatml_and_of_a_default_system_text_are_found():
    plain = said_of(tokenizer_with(CHATML), "base").written
    assert plain.question == ("<|im_start|>user\n", "<|im_end|>\n") and plain.start == "<|im_start|>assistant\n"
    assert (
        '{{ else }}{{ "<|im_start|>system\\nI am Small.<|im_end|>\\n" }}'
        in said_of(tokenizer_with(DEFAULT + CHATML), "").go_template
    )


def test_the_go_template_writes_each_part_as_a_string():
    written = said_of(tokenizer_with(CHATML), "base").go_template
    assert written.startswith('{{ if $.System }}{{ "<|im_start|>system\\n" }}{{ $.System }}{{ "<|im_end|>\\n" }}{{ end }}')
    assert written.endswith('{{ end }}{{ end }}{{ "<|im_start|>assistant\\n" }}')


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        ("{{ messages | length }}" + CHATML, "turns by themselves would be"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "is not rendered"),
        (
            "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML,
            "refuses a conversation of system, user",
        ),
        (CHATML.replace("{% for message in messages %}", "{% for message in messages[-3:] %}"), "turns by themselves"),
    ],
)
def test_a_template_that_cannot_be_said_is_refused(chat_template, said):
    with pytest.raises(ConfigError, match=said):
        said_of(tokenizer_with(chat_template), "base")


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        said_of(tokenizer, "base")


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama3", "mistral", "ministral", "phi4_mini", "mimo"])
def test_tools_of_these_templates_can_be_said(name: str):
    assert said_of(named(name), name).written.tools is not None


@pytest.mark.parametrize("name", ["qwen3", "deepseekr1", "hunyuan_small", "glmz1", "seed_oss"])
def test_thinking_of_these_templates_can_be_said(name: str):
    assert said_of(named(name), name).written.thinking is not None


@pytest.mark.parametrize(
    ("chat_template", "what", "why"),
    [
        (CHATML, "tools", "does not write tools"),
        (CHATML, "thinking", "does not write thoughts"),
        (ALWAYS_TOLD, "thinking", "no text before or after a thought"),
        (QUOTED_RESULTS, "tools", "turns by themselves would be"),
        (THOUGHTS_SINCE_QUESTION.replace("arguments | tojson", "arguments | string"), "tools", "does not write .* as JSON"),
        (THOUGHTS_SINCE_QUESTION.replace("~ tool | tojson", "~ tool.function.name"), "tools", "does not write tools as JSON"),
    ],
)
def test_tools_and_thinking_that_cannot_be_said_are_left_out_by_name(chat_template, what, why):
    said = said_of(tokenizer_with(chat_template), "base")
    assert getattr(said.written, what) is None
    with pytest.raises(ConfigError, match=why):
        raise ConfigError("", said.left_out[what])
    assert f"The Modelfile has no {what}. Of the chat template: " in said.notes


def test_thoughts_are_kept_where_the_chat_template_keeps_them():
    kept = [
        said_of(tokenizer, "").written.thinking
        for tokenizer in (named("qwen3"), tokenizer_with(THOUGHTS_SINCE_QUESTION), named("qwen"))
    ]
    assert [thinking and thinking.kept for thinking in kept] == [LAST, SINCE_QUESTION, EVER]


def test_a_date_that_is_written_once_is_said():
    assert "date" in said_of(tokenizer_with("{{ strftime_now('%Y') }}" + CHATML), "base").notes


def test_the_spaces_of_json_are_all_that_may_differ():
    assert without_spaces('a {"b": [1,  {"c": "d e"}]} {{ f') == 'a {"b":[1,{"c":"d e"}]} {{ f'


@needs_go
def test_go_renders_what_the_chat_template_does():
    written = [tokenizer_with(text) for text in (CHATML, DEFAULT + CHATML, TOOLS_WITH_QUESTION, THOUGHTS_SINCE_QUESTION)]
    tokenizers = [*written, *map(named, names())]
    each: list[Said] = [said_of(tokenizer, "base") for tokenizer in tokenizers]
    rendered = render([(said.go_template, [prompt.for_ollama() for prompt in prompts_of(said.written)]) for said in each])
    for tokenizer, said, ours in zip(tokenizers, each, rendered, strict=True):
        for prompt, text in zip(prompts_of(said.written), ours.texts, strict=True):
            assert without_spaces(text) == without_spaces(ChatTemplate(tokenizer, "").text(prompt))


@needs_go
def test_ollama_finds_calls_and_thoughts_by_the_marks_of_the_template():
    tokenizers = [named("qwen3"), tokenizer_with(THOUGHTS_SINCE_QUESTION), named("mistral"), tokenizer_with(TOOLS_WITH_QUESTION)]
    found = render([(said_of(tokenizer, "").go_template, []) for tokenizer in tokenizers])
    assert [marks.call.strip() for marks in found] == ["<tool_call>", "<tool_call>", "[TOOL_CALLS] [", ""]
    assert [marks.thought for marks in found] == [("<think>", "</think>")] * 2 + [("", "")] * 2


def test_a_modelfile_is_beside_the_file_with_its_stop_tokens(tmp_path: Path):
    base = small_model(tmp_path / "base", "llama")
    words = [f"model.path={base}", f"export.output_dir={tmp_path / 'out'}", "export.format=ollama", "export.check=false"]
    exported = api.export(load_config("export", words))
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-F32.gguf" and (tmp_path / "out" / "model-F32.gguf").is_file()
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_ctx 256" in lines
    assert "The Modelfile has no tools" in exported.notes and exported.notes in (tmp_path / "out" / "README.md").read_text()
