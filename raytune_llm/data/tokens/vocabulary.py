"""Tokens that a run adds to its tokenizer, and the texts that initialize their embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from raytune_llm.config.model import ModelConfig
from raytune_llm.config.paths import expanded
from raytune_llm.config.plain import typed_object
from raytune_llm.errors import NOT_YAML, ConfigError, first_line

SETTING = "model.new_tokens"
EXAMPLE = "For example, 'model.new_tokens=[<light>,<door>]'."


def new_tokens(model: ModelConfig) -> dict[str, str]:
    """Token of model.new_tokens -> the text whose mean embedding initializes it: its description, or the token itself.

    Raises ConfigError for a file that can't be read, and for an entry that is not a token.
    """
    given: Any = _read(model.new_tokens) if isinstance(model.new_tokens, str) else model.new_tokens or {}
    described = given if isinstance(given, dict) else {token: token for token in given}
    if isinstance(given, list) and len(described) < len(given):
        twice = next(token for token in given if given.count(token) > 1)
        raise ConfigError(SETTING, "must name each token once", got=twice, fix="Leave the second one out.")
    for token, text in described.items():
        if not token.strip() or not text.strip():
            raise ConfigError(SETTING, "must not hold an empty token or description", got=[token, text], fix=EXAMPLE)
    return described


def add_new_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Mapping[str, str]) -> None:
    """Add tokens that are words of the text: they are found anywhere in a text, never escaped, and kept in decoded text."""
    known = tokenizer.get_vocab()
    if there := [token for token in tokens if token in known]:
        rule = f"must be new to the tokenizer, which has {', '.join(there[:3])} already"
        raise ConfigError(SETTING, rule, got=there, fix="Leave them out: they need no new embedding.")
    added: Any = [AddedToken(token, normalized=False) for token in tokens]  # transformers' stubs name another class
    tokenizer.add_tokens(added)


def _read(given: str) -> list[str] | dict[str, str]:
    """The tokens from text: either {token: description} as typed (Hydra can't parse keys such as <light>), or a file. A YAML or
    JSON file has a list or {token: description}; any other file has one token per line."""
    try:
        content = _content(given)
    except (OSError, *NOT_YAML) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        rule = f"must be a list of tokens, or a file with one ({reason})"
        raise ConfigError(SETTING, rule, got=given, fix=EXAMPLE) from None
    if isinstance(content, list) and all(isinstance(token, str) for token in content):
        return [token.strip() for token in content if token.strip()]
    if isinstance(content, dict) and all(isinstance(item, str) for pair in content.items() for item in pair):
        return content
    rule = "must be a list of tokens, or have a description (text) for each"
    raise ConfigError(SETTING, rule, got=given, fix="For example, {<light>: a lamp in a room}.")


def _content(given: str) -> Any:
    if (typed := typed_object(given)) is not None:
        return typed
    file = expanded(given)
    text = file.read_text(encoding="utf-8")
    return yaml.safe_load(text) if file.suffix in (".yaml", ".yml", ".json") else text.splitlines()
