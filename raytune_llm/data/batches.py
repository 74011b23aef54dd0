"""Rows of a store -> documents -> batches. What a row of each kind is in a batch is decided here.

A document is ids and flattened trained spans. A conversation is one document; a pair two, its request with each answer; a
labelled answer two as well, its request with its own answer and with another row's, in two batches since not both are always run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raytune_llm.data.store import Rows
from raytune_llm.data.truncation import shares
from raytune_llm.records import IGNORE, AnswerBatch, Batch, LabeledBatch, PairBatch

PADDING_DOCUMENT = 64
"""Tokens of a document of padding where there is no other."""
Document = tuple[np.ndarray, np.ndarray]
Fields = tuple[dict[str, Any], np.ndarray]
"""The fields of a Batch, and the number of each document in it; a row's are next to each other."""


@dataclass(frozen=True)
class Kind:
    """How rows of a store are batched."""

    sides: int
    """Documents of a row in one batch: a pack holds so many times data.max_length tokens."""
    parts: int
    """Batches of the same shape that a row's documents are dealt out to."""
    documents: Callable[[Rows, int, int, int], list[Document]]
    """Of a row, its partner (another row) and max_length."""
    batch: Callable[[list[Fields], np.ndarray, Rows], Batch]
    """From the fields of each part, the rows and the store."""


def _conversation(store: Rows, row: int, partner: int, max_length: int) -> list[Document]:
    return [store.row(row)]  # type: ignore[list-item]


def _pair(store: Rows, row: int, partner: int, max_length: int) -> list[Document]:
    prompt, chosen, rejected = store.row(row)
    return [_answered(prompt, chosen), _answered(prompt, rejected)]


def _labeled(store: Rows, row: int, partner: int, max_length: int) -> list[Document]:
    prompt, answer = store.row(row)
    _, other = store.row(partner)
    source, target = shares(len(prompt), len(other), max_length)
    if len(prompt) + len(other) <= max_length:
        source, target = len(prompt), len(other)
    return [_answered(prompt, answer), _answered(prompt[:source], other[:target])]


def _answered(prompt: np.ndarray, answer: np.ndarray) -> Document:
    return np.concatenate([prompt, answer]), np.array([len(prompt), len(prompt) + len(answer)], np.int32)


def _plain_batch(made: list[Fields], rows: np.ndarray, store: Rows) -> Batch:
    return Batch(**made[0][0])


def _pair_batch(made: list[Fields], rows: np.ndarray, store: Rows) -> PairBatch:
    ((fields, numbers),) = made
    return PairBatch(
        **fields,
        documents_N=_documents(fields),
        chosen_P=torch.from_numpy(numbers[0::2].copy()),
        rejected_P=torch.from_numpy(numbers[1::2].copy()),
        rows=tuple(rows.tolist()),
    )


def _labeled_batch(made: list[Fields], rows: np.ndarray, store: Rows) -> LabeledBatch:
    (own, numbers), (other, other_numbers) = made
    return LabeledBatch(
        **own,
        documents_N=_documents(own),
        answers_P=torch.from_numpy(numbers),
        mismatched=AnswerBatch(**other, documents_N=_documents(other), answers_P=torch.from_numpy(other_numbers)),
        desirable_P=torch.from_numpy(store.desirable[rows]),
        rows=tuple(rows.tolist()),
    )


def _documents(fields: dict[str, Any]) -> torch.Tensor:
    ends: torch.Tensor = fields["cu_seqlens_S"][1:].long()
    return torch.searchsorted(ends, fields["trained_N"], right=True)


KINDS = {
    "conversations": Kind(1, 1, _conversation, _plain_batch),
    "text": Kind(1, 1, _conversation, _plain_batch),
    "pairs": Kind(2, 1, _pair, _pair_batch),
    "labeled": Kind(1, 2, _labeled, _labeled_batch),
}


def collate(
    lines: Sequence[Sequence[Document]],
    *,
    length: int,
    pad_id: int,
    sample_ids: tuple[int, ...] = (),
    end_of_row: int | None = None,
) -> Batch:
    """Documents end to end, one list a row of the batch, each row padded to `length` tokens."""
    return Batch(**fields(lines, length=length, pad_id=pad_id, sample_ids=sample_ids, end_of_row=end_of_row)[0])


def fields(
    lines: Sequence[Sequence[Document]],
    *,
    length: int,
    pad_id: int,
    sample_ids: tuple[int, ...] = (),
    end_of_row: int | None = None,
) -> Fields:
    """Documents end to end, as `collate` does it.

    Padding makes documents of its own, none longer than the longest real one, so that it does not set max_seqlen. Where
    end_of_row is given, it is the target at the end of every span, whatever stands there.
    """
    shape = (len(lines), length)
    ids_BT = np.full(shape, pad_id, np.int64)
    labels_BT = np.full(shape, IGNORE, np.int64)
    positions_BT = np.zeros(shape, np.int64)
    longest = max((len(ids) for line in lines for ids, _ in line), default=0) or min(length, PADDING_DOCUMENT)
    ramp = np.arange(longest)
    boundaries = [0]
    numbers: list[int] = []
    for number, line in enumerate(lines):
        at = 0
        for ids, spans in line:
            end = at + len(ids)
            ids_BT[number, at:end] = ids
            positions_BT[number, at:end] = ramp[: len(ids)]
            for start, stop in spans.reshape(-1, 2).tolist():
                start = max(start, 1)  # nothing predicts the first token
                labels_BT[number, at + start - 1 : at + stop - 1] = ids[start:stop]
                if end_of_row is not None:
                    labels_BT[number, at + stop - 2] = end_of_row
            numbers.append(len(boundaries) - 1)
            boundaries.append(number * length + end)
            at = end
        while at < length:
            end = min(at + longest, length)
            positions_BT[number, at:end] = ramp[: end - at]
            boundaries.append(number * length + end)
            at = end
    made: dict[str, Any] = {
        "ids_BT": torch.from_numpy(ids_BT),
        "labels_BT": torch.from_numpy(labels_BT),
        "positions_BT": torch.from_numpy(positions_BT),
        "trained_N": torch.from_numpy(np.flatnonzero(labels_BT != IGNORE)),
        "cu_seqlens_S": torch.tensor(boundaries, dtype=torch.int32),
        "max_seqlen": longest,
        "sample_ids": sample_ids,
    }
    return made, np.array(numbers, np.int64)


def moved(batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The batch with each of its tensors moved, those of batches in it among them."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    batches = {name: moved(value, move) for name, value in values.items() if isinstance(value, Batch)}
    return dataclasses.replace(batch, **tensors, **batches)


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, from which copies to a GPU do not wait."""
    return moved(batch, torch.Tensor.pin_memory)
