from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.templates.named import apply_to_tokenizer, load
from raytune_llm.data.tokens.tokenizer import CHATML, byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.export.ollama import turns_of
from tests.llama_cpp import small_model

DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am Small.<|im_end|>\n{% endif %}"


def tokenizer_with(chat_template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def test_the_turns_of_chatml_and_of_a_default_system_text_are_found():
    plain = turns_of(tokenizer_with(CHATML), "base")
    assert plain.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n") and plain.default_system is None
    assert turns_of(tokenizer_with(DEFAULT + CHATML), "base").default_system == "I am Small."


def test_the_go_template_writes_each_part_as_a_string():
    written = turns_of(tokenizer_with(CHATML), "base").go_template()
    assert written.startswith('{{ range .Messages }}{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}')
    assert written.endswith('{{ end }}{{ end }}{{ "<|im_start|>assistant\\n" }}')


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        ("{{ messages | length }}" + CHATML, "parts of turns that depend on others|turns by themselves"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "is not rendered"),
        ("{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML, "no system"),
        (CHATML.replace("{% for message in messages %}", "{% for message in messages[-3:] %}"), "turns by themselves"),
    ],
)
def test_a_template_that_cannot_be_said_is_refused(chat_template, said):
    with pytest.raises(ConfigError, match=said):
        turns_of(tokenizer_with(chat_template), "base")


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        turns_of(tokenizer, "base")


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_named_templates_can_be_said(name: str):
    tokenizer = byte_tokenizer()
    apply_to_tokenizer(tokenizer, load(name, default_system=None, tool_format=None, date=None))
    assert turns_of(tokenizer, "base").around["user"][0] == "<|im_start|>user\n"


def test_a_modelfile_is_beside_the_file_with_its_stop_tokens(tmp_path: Path):
    base = small_model(tmp_path / "base", "llama")
    words = [f"model.path={base}", f"export.output_dir={tmp_path / 'out'}", "export.format=ollama", "export.check=false"]
    api.export(load_config("export", words))
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-F32.gguf" and (tmp_path / "out" / "model-F32.gguf").is_file()
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_ctx 256" in lines
