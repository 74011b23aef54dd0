from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from raytune_llm.data.kinds.kind import Targets
from raytune_llm.data.shards import Recipe, Shortened, made_rows
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.tokens.tokenize import BlockTokenizer
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.records import Conversation, Message, Record


@dataclass
class Making:
    """Rows of records, of bytes and in ChatML."""

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.renderer = ChatTemplate(self.tokenizer)
        self.targets = Targets(max_length=1000, overlong="truncate")

    def row(self, kind: str, record: Record, *, renderer: Any = None, **targets: Any) -> Any:
        changed = replace(self.targets, **targets)
        tokenize = BlockTokenizer(self.tokenizer)
        recipe = Recipe(kind, (), lambda record: record, renderer or self.renderer, tokenize, changed)
        [(_, row)] = made_rows([(0, record)], recipe)  # type: ignore[list-item]
        if isinstance(row, Exception):
            raise row
        return row.row if isinstance(row, Shortened) else row

    def text(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids))


@pytest.fixture(scope="session")
def making() -> Making:
    return Making()


@pytest.fixture(scope="session")
def talk() -> Callable[..., Conversation]:
    """Texts of user and assistant in turn."""

    def talk(*texts: str) -> Conversation:
        roles = ("user", "assistant")
        return Conversation(tuple(Message(roles[n % 2], text, trained=n % 2 == 1) for n, text in enumerate(texts)))  # type: ignore[arg-type]

    return talk
