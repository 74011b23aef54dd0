from __future__ import annotations

import numpy as np
import pytest

from raytune_llm.commands.prepare import shown
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.data.kinds.prompts import PromptRow
from raytune_llm.data.kinds.text import TextRow
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from tests.steps import make_store


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "row", "learned"),
    [
        ("conversations", ConversationRow(ids("q:yes q:no"), [2, 5, 8, 10], [0.5, 1.0]), ["yes", "no"]),
        ("text", TextRow(ids("book")), ["book"]),
        ("pairs", PairRow(ids("q:"), ids("good"), ids("bad")), ["good", "bad"]),
        ("labeled", LabeledRow(ids("q:"), ids("good"), True), ["good"]),
        ("prompts", PromptRow(ids("q:"), ids("good")), []),
    ],
)
def test_what_is_learned_of_a_row_is_shown_in_green(tmp_path, kind, row, learned):
    text = shown(make_store(tmp_path, kind, [row]), 0, byte_tokenizer())
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "green"] == learned
