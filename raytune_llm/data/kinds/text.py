"""Plain text: all of it is trained. Packs hold texts end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds.answers import NOTHING_LEFT, check_length
from raytune_llm.data.kinds.kind import IDS, Document, Ids, Kind, MappedShard, Place, Rows, Targets, sizes_of
from raytune_llm.data.templates.rendered import PlainText, Rendered
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.records import Conversation, Labeled, Pair, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_TOKENS = 32
"""The prompt of a plain text: its first tokens, at most this many, or half of a short text."""


class TextRow(NamedTuple):
    ids: Ids


class TextKind(Kind):
    row = TextRow
    columns: ClassVar = {"ids": IDS}
    renders_chat = False
    end_to_end = True

    def targets(self, common: Targets, tokenizer: PreTrainedTokenizerFast, *, packing: bool) -> Targets:
        return replace(common, text_start=text_start(tokenizer), text_end=tokenizer.eos_token_id, texts_whole=packing)

    def render(self, record: Record, renderer: PlainText, targets: Targets) -> tuple[Rendered, ...]:
        match record:
            case Text(text=text):
                pass
            case Conversation(messages=messages) | Labeled(conversation=Conversation(messages=messages)):
                text = next((message.content for message in messages if message.role != "system"), "")
            case Pair():
                raise BadRow("the row is a pair of answers, not plain text")
        if not text:
            raise BadRow("the text is empty")
        return (Rendered(text, (), (), plain=tuple(found.span() for found in renderer.control.finditer(text))),)

    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> TextRow:
        start = [] if targets.text_start is None else [targets.text_start]
        end = [] if targets.text_end is None else [targets.text_end]
        ids = np.concatenate([start, tokens[0].ids, end]).astype(np.int32)
        if not targets.texts_whole:
            check_length(len(ids), targets, cut=cut)
            ids = ids[: targets.max_length]
        if len(ids) < 2:  # nothing predicts the very first token
            raise BadRow(NOTHING_LEFT)
        return TextRow(ids)

    def lengths(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["ids"])

    def trained(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["ids"]) - 1

    def counts(self, shard: MappedShard) -> np.ndarray:
        return self.trained(shard).astype(np.int64)

    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        (ids,) = store.row(place.row)
        return [Document(ids[place.start : place.start + place.length], np.array([0, place.length], np.int32))]

    def prompt_and_answer(self, row: TextRow) -> tuple[np.ndarray, np.ndarray]:
        return rest_of_text(np.asarray(row.ids))


def text_start(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that the tokenizer puts before each plain text, or None."""
    first = tokenizer("a").input_ids[:1]
    return first[0] if first == [tokenizer.bos_token_id] else None


def rest_of_text(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first PROMPT_TOKENS tokens (or half of a short text), and the rest."""
    at = min(PROMPT_TOKENS, (len(ids) + 1) // 2)
    return ids[:at], ids[at:]
