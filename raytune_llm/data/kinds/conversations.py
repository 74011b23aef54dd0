"""Conversations: each is one document, in which all trained answers are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.kinds.answers import NOTHING_LEFT, check_length, check_media
from raytune_llm.data.kinds.kind import IDS, Column, Document, Ids, Kind, MappedShard, Place, Rows, Targets, sizes_of
from raytune_llm.data.kinds.text import rest_of_text
from raytune_llm.data.templates.rendered import Rendered, Renderer
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.data.tokens.truncation import shorten
from raytune_llm.records import Conversation, Labeled, Pair, Record, Text, last_answer_only

WHAT = {
    Pair: "a pair of answers, as preference stages (stage=dpo) and stage=reward learn from",
    Labeled: "an answer with a verdict, as stage=kto learns from",
    Text: "plain text, as stage=pretrain learns from",
}
"""How an error message describes a row that is not a conversation."""


class ConversationRow(NamedTuple):
    ids: Ids
    spans: Ids
    """Trained ranges [start, end), flattened: start, end, start, end, ..."""
    weights: Sequence[float] | np.ndarray = ()
    """Weight of each span in the loss; empty if all are 1."""


class ConversationKind(Kind):
    row = ConversationRow
    columns: ClassVar = {"ids": IDS, "spans": IDS, "weights": Column(np.float32)}

    def render(self, record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
        if not isinstance(record, Conversation):
            raise BadRow("the row is not a plain conversation", f"it is {WHAT[type(record)]}")
        conversation = last_answer_only(record) if targets.mask_history else record
        if not any(message.role == "assistant" for message in conversation.messages):
            raise BadRow("there is no answer to learn")
        if not any(message.trained for message in conversation.messages):
            raise BadRow("no answer is trained")
        check_media(conversation)
        return (renderer.render(conversation, earlier_answers=not targets.mask_history or targets.preserve_thinking),)

    def keeps_last_answer(self, targets: Targets) -> bool:
        return targets.mask_history

    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> ConversationRow:
        (text,), (whole,) = rendered, tokens
        room = targets.max_length - (targets.end_of_row is not None)
        kept = whole
        if len(whole.ids) > room:
            check_length(len(whole.ids) + targets.max_length - room, targets, cut=cut)
            kept = shorten(whole, room, last_first=targets.mask_history)
        if targets.end_of_row is not None:
            return _ended(kept, text.weights, targets.end_of_row)
        if targets.train_on_prompt:
            end = kept.answers[-1] if text.ends_early else len(kept.ids)
            return _trained(kept.ids, np.array([(0, end)]), (1.0,))
        return _trained(kept.ids, kept.answers.reshape(-1, 2), text.weights)

    def lengths(self, shard: MappedShard) -> np.ndarray:
        return sizes_of(shard["ids"])

    def trained(self, shard: MappedShard) -> np.ndarray:
        return targets_of_spans(*shard["spans"])

    def counts(self, shard: MappedShard) -> np.ndarray:
        """The sum of the weights of each row's trained tokens: int64 if all weights are 1, else float64."""
        (offsets, weights), (span_offsets, spans) = shard["weights"], shard["spans"]
        if not len(weights):
            return targets_of_spans(span_offsets, spans)
        of_spans = np.ones(len(spans) // 2)
        of_spans[np.repeat(np.diff(offsets) > 0, np.diff(span_offsets) // 2)] = weights
        return targets_of_spans(span_offsets, spans, of_spans)

    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        ids, spans, weights = store.row(place.row)
        return [Document(ids, spans, weights=weights)]

    def prompt_and_answer(self, row: ConversationRow) -> tuple[np.ndarray, np.ndarray]:
        """The last answer and its prompt. A row that is trained in full is split like a text."""
        ids = np.asarray(row.ids)
        start, end = row.spans[-2:]
        return (ids[:start], ids[start:end]) if start > 0 else rest_of_text(ids)


def targets_of_spans(span_offsets: np.ndarray, spans: np.ndarray, weights: np.ndarray | int = 1) -> np.ndarray:
    """The number of trained tokens of each row, times their spans' weights. A first token is not counted: nothing predicts it."""
    starts, ends = spans[0::2], spans[1::2]
    counts = (ends - np.maximum(starts, 1)).astype(np.int64) * weights
    passed = np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])
    return passed[span_offsets[1:] // 2] - passed[span_offsets[:-1] // 2]


def _ended(tokens: Tokens, weights: tuple[float, ...], end: int) -> ConversationRow:
    """The row with the end token after the last answer. At the end of every other span it is the target instead of the token that
    follows in the text.

    If the whole prompt of a turn was cut, there is no position for the end token of the turn before; that turn and all later ones
    are removed.
    """
    answers = tokens.answers.reshape(-1, 2)
    touching = np.flatnonzero((answers[1:, 0] == answers[:-1, 1]) & (answers[1:, 1] > answers[1:, 0]))
    if len(touching):
        answers = answers[: touching[0] + 1]
    ids = np.append(tokens.ids[: answers[-1, 1]], np.int32(end))
    ended = answers[:, 1] > answers[:, 0]
    ended[-1] = True  # even if all of the answer was cut, except its end
    return _trained(ids, np.stack([answers[:, 0], answers[:, 1] + ended], axis=1), weights[: len(answers)])


def _trained(ids: np.ndarray, answers: np.ndarray, weights: tuple[float, ...]) -> ConversationRow:
    """The row with the answers that have a weight above 0 and a target. The first token is no target, since nothing predicts
    it."""
    # A plain loop, which is faster than numpy for three or four answers.
    turns = zip(answers.tolist(), weights, strict=True)
    targets = [(start, end, weight) for (start, end), weight in turns if weight > 0 and end > max(start, 1)]
    if not targets:
        raise BadRow(NOTHING_LEFT)
    spans = np.array([edge for start, end, _ in targets for edge in (start, end)], np.int32)
    if all(weight == 1 for *_, weight in targets):
        return ConversationRow(ids, spans)
    return ConversationRow(ids, spans, np.array([weight for *_, weight in targets], np.float32))
