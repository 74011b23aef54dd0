"""Pairs: a prompt and two answers to it, the first preferred.

A row is two documents of one batch: the prompt with the chosen answer, and the prompt with the rejected one. If prompts are
shared, the second document is only the rejected answer, which attends to the first document's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds.answers import NOTHING_LEFT, answered, check_answer, check_length, check_media, prompt_and_answer
from raytune_llm.data.kinds.kind import IDS, Column, Document, Ids, Kind, MappedShard, Place, Rows, Targets, ones, sizes_of
from raytune_llm.data.templates.rendered import Rendered, Renderer
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.data.tokens.truncation import shares
from raytune_llm.records import Pair, Record


class PairRow(NamedTuple):
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float = 0.0


class PairKind(Kind):
    row = PairRow
    columns: ClassVar = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "margin": Column(np.float32, is_list=False)}
    ranked = True
    sides = 2
    can_share_prompts = True
    judges_answers = True

    def render(self, record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
        if not isinstance(record, Pair):
            raise BadRow("the row is not a pair of answers", "set data.format.chosen and data.format.rejected to its columns")
        check_media(record.prompt)
        if record.chosen == record.rejected:
            raise BadRow("both answers are the same")
        for answer in (record.chosen, record.rejected):
            check_answer(answer[-1])
        messages = record.prompt.messages
        sides = (replace(record.prompt, messages=(*messages, *answer)) for answer in (record.chosen, record.rejected))
        # Cut before the answers, so that the prompt has the same tokens on both sides.
        return tuple(replace(side, cuts=(*side.cuts, side.answers[-1][0])) for side in renderer.pair(*sides))

    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> PairRow:
        assert isinstance(record, Pair)
        (prompt, chosen), (_, rejected) = (
            prompt_and_answer(text, side, targets) for text, side in zip(rendered, tokens, strict=True)
        )
        longer = max(len(chosen), len(rejected))
        check_length(len(prompt) + longer, targets, cut=cut)
        source, target = shares(len(prompt), longer, targets.max_length)
        row = PairRow(prompt[:source], chosen[:target], rejected[:target], record.margin)
        if not min(len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)):
            raise BadRow(NOTHING_LEFT)
        return row

    def lengths(self, shard: MappedShard) -> np.ndarray:
        """Both sides, each with the prompt."""
        return 2 * sizes_of(shard["prompt_ids"]) + self.trained(shard)

    def trained(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["chosen_ids"]) + sizes_of(shard["rejected_ids"])

    def counts(self, shard: MappedShard) -> np.ndarray:
        return ones(shard["prompt_ids"])

    def sizes(
        self, store: Rows, rows: np.ndarray, partners: np.ndarray, *, max_length: int, share_prompts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        lengths = store.lengths[rows].astype(np.int64)
        if share_prompts:
            lengths = lengths - store.list_lengths("prompt_ids")[rows]
        return lengths, lengths

    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        prompt, chosen, rejected, _ = store.row(place.row)
        if share_prompts:
            return [answered(prompt, chosen), Document(rejected, np.array([0, len(rejected)], np.int32), len(prompt))]
        return [answered(prompt, chosen), answered(prompt, rejected)]

    def per_answer(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """margins: float32, by how much the chosen answer's score is to be higher."""
        return {"margins": store.numbers("margin")[rows]}

    def prompt_and_answer(self, row: PairRow) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(row.prompt_ids), np.asarray(row.chosen_ids)
