"""Labelled answers: a prompt, an answer, and whether the answer is desirable.

A row is one document. A second batch holds the same prompt with the answer of another row, from which KTO estimates the KL
divergence of the policy from the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds.answers import NOTHING_LEFT, answered, check_answer, check_media, shortened
from raytune_llm.data.kinds.kind import IDS, Column, Document, Ids, Kind, MappedShard, Place, Rows, Targets, ones, sizes_of
from raytune_llm.data.templates.rendered import Rendered, Renderer
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.records import Labeled, Record


class LabeledRow(NamedTuple):
    prompt_ids: Ids
    answer_ids: Ids
    desirable: bool


class LabeledKind(Kind):
    row = LabeledRow
    columns: ClassVar = {"prompt_ids": IDS, "answer_ids": IDS, "desirable": Column(np.bool_, is_list=False)}
    beside = ("mismatched",)
    has_partners = True
    judges_answers = True

    def render(self, record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
        if not isinstance(record, Labeled):
            raise BadRow("the row has no verdict", "set data.format.label to a column that is true or false")
        check_media(record.conversation)
        if record.conversation.messages[-1].role != "assistant":
            raise BadRow("there is no answer to judge")
        check_answer(record.conversation.messages[-1])
        return (renderer.render(record.conversation, earlier_answers=False),)

    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> LabeledRow:
        assert isinstance(record, Labeled)
        prompt, answer = shortened(rendered[0], tokens[0], targets, cut=cut)
        if not min(len(prompt), len(answer)):
            raise BadRow(NOTHING_LEFT)
        return LabeledRow(prompt, answer, record.desirable)

    def lengths(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["prompt_ids"]) + sizes_of(shard["answer_ids"])

    def trained(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["answer_ids"])

    def counts(self, shard: MappedShard) -> np.ndarray:
        return ones(shard["prompt_ids"])

    def sizes(
        self, store: Rows, rows: np.ndarray, partners: np.ndarray, *, max_length: int, share_prompts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        own, prompts = store.lengths[rows].astype(np.int64), store.list_lengths("prompt_ids")
        mismatched = np.minimum(prompts[rows] + store.list_lengths("answer_ids")[partners], max_length)
        return own + mismatched, np.maximum(own, mismatched)

    def remarks(self, store: Rows) -> tuple[str, ...]:
        verdicts = store.numbers("desirable")
        if not len(verdicts) or len(np.unique(verdicts)) > 1:
            return ()
        each = "good" if verdicts[0] else "bad"
        return (f"verdicts: every answer is a {each} one, so that there is no difference to learn from; stage=kto needs both",)

    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        prompt, answer, _ = store.row(place.row)
        _, other, _ = store.row(place.partner)
        return [answered(prompt, answer), answered(prompt, other[: max_length - len(prompt)])]

    def per_answer(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """desirable: bool."""
        return {"desirable": store.numbers("desirable")[rows]}

    def prompt_and_answer(self, row: LabeledRow) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(row.prompt_ids), np.asarray(row.answer_ids)
