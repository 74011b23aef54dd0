"""Tokens that a run adds to its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytune_llm import load_config
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.data.tokens.tokenizer import first_pieces, run_tokenizer
from raytune_llm.errors import ConfigError


def id_of(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def settings(*overrides: str):
    run = load_config("prepare", ["model=smollm2_135m", "data=chat", "data.path=rows.jsonl", *overrides])
    return run.model, run.data


def test_a_new_token_is_one_id_in_any_text_and_stays_where_text_is_decoded():
    tokenizer, _ = run_tokenizer(*settings("model.new_tokens=[<light>,<door>]"))
    ids = tokenizer.encode("turn the<light>on", add_special_tokens=False)
    light = id_of(tokenizer, "<light>")
    assert light in ids and light >= 49152
    assert tokenizer.decode(ids, skip_special_tokens=True) == "turn the<light>on"


def test_embeddings_begin_as_the_pieces_of_the_token_or_of_its_description():
    model, data = settings("model.new_tokens={<light>: a lamp}")
    tokenizer, _ = run_tokenizer(model, data)
    before, _ = run_tokenizer(replace(model, new_tokens=[]), data)
    light = id_of(tokenizer, "<light>")
    assert first_pieces(model, tokenizer) == {light: before.encode("a lamp", add_special_tokens=False)}
    model = replace(model, new_tokens=["<light>"])
    assert first_pieces(model, tokenizer) == {light: before.encode("<light>", add_special_tokens=False)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.txt", "<light>\n<door>\n"),
        ("tokens.yaml", '"<light>": lamp\n"<door>": gate\n'),
        ("t.json", '["<light>", "<door>"]'),
    ],
)
def test_tokens_come_from_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    tokenizer, _ = run_tokenizer(*settings(f"model.new_tokens={tmp_path / name}"))
    assert {"<light>", "<door>"} <= tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing.txt", "No such file"),
        ("[<a>,<a>]", "each token once"),
        ("[' ']", "empty token"),
        ("[<|im_end|>]", "has <|im_end|> already"),
    ],
)
def test_what_is_no_new_token_is_refused_by_name(given, said):
    with pytest.raises(ConfigError, match=r"model\.new_tokens") as caught:
        run_tokenizer(*settings(f"model.new_tokens={given}"))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["{a: 1}", "a: [", "3", "- [1]", "\x00"])
def test_files_of_something_else_are_refused_by_name(tmp_path, content):
    (tmp_path / "tokens.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.new_tokens must be"):
        run_tokenizer(*settings(f"model.new_tokens={tmp_path / 'tokens.yaml'}"))


def test_what_a_template_lacks_is_added_where_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"model\.resize_vocab=true"):
        run_tokenizer(*settings("data.template=llama3"))
    model, data = settings("data.template=llama3", "model.resize_vocab=true")
    tokenizer, template = run_tokenizer(model, data)
    assert template is not None
    added = {str(tokenizer.convert_ids_to_tokens(id)) for id in first_pieces(model, tokenizer)}
    assert added and added <= {*template.stop_tokens, str(tokenizer.eos_token)}


def test_a_file_is_found_from_other_folders_and_a_token_is_no_path(tmp_path, monkeypatch):
    (tmp_path / "light").write_text("<light>\n")
    monkeypatch.chdir(tmp_path)
    words = ["data.path=rows.jsonl", "data=chat", "model=smollm2_135m"]
    from_file = with_absolute_paths(load_config("prepare", [*words, "model.new_tokens=light"]))
    assert from_file.model.new_tokens == str(tmp_path / "light")
    listed = with_absolute_paths(load_config("prepare", [*words, "model.new_tokens=[light]"]))
    assert listed.model.new_tokens == ["light"]
