"""Prompts, with the answer if the data have one. Nothing is trained.

A batch holds only the prompts; Batch.rows tells which rows they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds.answers import check_media, shortened
from raytune_llm.data.kinds.kind import IDS, Document, Ids, Kind, MappedShard, Place, Rows, Targets, ones, sizes_of
from raytune_llm.data.templates.rendered import Rendered, Renderer
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.records import Conversation, Labeled, Message, Pair, Record, Text


class PromptRow(NamedTuple):
    prompt_ids: Ids
    answer_ids: Ids


class PromptKind(Kind):
    row = PromptRow
    columns: ClassVar = {"prompt_ids": IDS, "answer_ids": IDS}

    def render(self, record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
        match record:
            case Labeled(conversation=conversation) | Pair(prompt=conversation) | (Conversation() as conversation):
                check_media(conversation)
            case Text():
                raise BadRow("the row is plain text, no conversation")
        messages = conversation.messages
        if messages[-1].role != "assistant":
            messages = (*messages, Message("assistant", ""))
        return (renderer.render(replace(conversation, messages=messages), earlier_answers=False),)

    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> PromptRow:
        prompt, answer = shortened(rendered[0], tokens[0], targets, cut=cut)
        if not len(prompt):
            raise BadRow("the prompt is empty")
        return PromptRow(prompt, answer)

    def lengths(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["prompt_ids"])

    def trained(self, shard: MappedShard) -> np.ndarray:
        return np.zeros(len(sizes_of(shard["prompt_ids"])), np.int64)

    def counts(self, shard: MappedShard) -> np.ndarray:
        return ones(shard["prompt_ids"])

    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        prompt, _ = store.row(place.row)
        return [Document(prompt, np.zeros(0, np.int32))]

    def prompt_and_answer(self, row: PromptRow) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(row.prompt_ids), np.asarray(row.answer_ids)
