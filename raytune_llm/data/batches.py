"""Rows of a store -> documents -> batches. What a row of each kind is in a batch is decided here.

A document is ids and flattened trained spans. A conversation is one document; a pair two, its request with each answer; a
labelled answer two as well, its request with its own answer and with another row's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raytune_llm.data.store import Store
from raytune_llm.data.truncation import shares
from raytune_llm.records import IGNORE, Batch, LabeledBatch, PairBatch

PADDING_DOCUMENT = 64
"""Tokens of a document of padding where there is no other."""
Document = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """How rows of a store are batched."""

    sides: int
    """Documents of a row: a pack holds so many times data.max_length tokens."""
    documents: Callable[[Store, int, int, int], list[Document]]
    """Of a row, its partner (another row) and max_length."""
    batch: Callable[[dict[str, Any], np.ndarray, np.ndarray, Store], Batch]
    """From Batch's fields, the documents' numbers (a row's are next to each other), the rows and the store."""


def _conversation(store: Store, row: int, partner: int, max_length: int) -> list[Document]:
    return [store.row(row)]  # type: ignore[list-item]


def _pair(store: Store, row: int, partner: int, max_length: int) -> list[Document]:
    prompt, chosen, rejected = store.row(row)
    return [_answered(prompt, chosen), _answered(prompt, rejected)]


def _labeled(store: Store, row: int, partner: int, max_length: int) -> list[Document]:
    prompt, answer = store.row(row)
    _, other = store.row(partner)
    source, target = shares(len(prompt), len(other), max_length)
    if len(prompt) + len(other) <= max_length:
        source, target = len(prompt), len(other)
    return [_answered(prompt, answer), _answered(prompt[:source], other[:target])]


def _answered(prompt: np.ndarray, answer: np.ndarray) -> Document:
    return np.concatenate([prompt, answer]), np.array([len(prompt), len(prompt) + len(answer)], np.int32)


def _plain_batch(fields: dict[str, Any], numbers: np.ndarray, rows: np.ndarray, store: Store) -> Batch:
    return Batch(**fields)


def _pair_batch(fields: dict[str, Any], numbers: np.ndarray, rows: np.ndarray, store: Store) -> PairBatch:
    return PairBatch(
        **fields,
        documents_N=_documents(fields),
        chosen_P=torch.from_numpy(numbers[0::2].copy()),
        rejected_P=torch.from_numpy(numbers[1::2].copy()),
        rows=tuple(rows.tolist()),
    )


def _labeled_batch(fields: dict[str, Any], numbers: np.ndarray, rows: np.ndarray, store: Store) -> LabeledBatch:
    return LabeledBatch(
        **fields,
        documents_N=_documents(fields),
        answers_P=torch.from_numpy(numbers[0::2].copy()),
        mismatched_P=torch.from_numpy(numbers[1::2].copy()),
        desirable_P=torch.from_numpy(store.desirable[rows]),
        rows=tuple(rows.tolist()),
    )


def _documents(fields: dict[str, Any]) -> torch.Tensor:
    ends: torch.Tensor = fields["cu_seqlens_S"][1:].long()
    return torch.searchsorted(ends, fields["trained_N"], right=True)


KINDS = {
    "conversations": Kind(1, _conversation, _plain_batch),
    "text": Kind(1, _conversation, _plain_batch),
    "pairs": Kind(2, _pair, _pair_batch),
    "labeled": Kind(2, _labeled, _labeled_batch),
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
) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of a Batch, and the number of each document in it.

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


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, from which copies to a GPU do not wait."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    pinned: dict[str, Any] = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **pinned)
