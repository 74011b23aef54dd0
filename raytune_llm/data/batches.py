"""Rows of a store -> documents -> batches. What a row of each kind is in a batch is decided here.

A conversation is one document. A pair is two: its request with each answer, or the rejected answer alone, going on from the
request in the first document. A labelled answer is two as well, its request with its own answer and with another row's, in two
batches since not both are always run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from raytune_llm.data.store import Rows
from raytune_llm.data.tokens.truncation import shares
from raytune_llm.records import AnswerBatch, Batch, LabeledBatch, PairBatch, Prefixes

PADDING_DOCUMENT = 64
"""Tokens of a document of padding where there is no other."""


class Document(NamedTuple):
    ids: np.ndarray
    spans: np.ndarray
    """Trained ranges, flattened: start, end, start, end, ..."""
    prefix: int = 0
    """It goes on from so many first tokens of the document before it."""
    weights: Sequence[float] | np.ndarray = ()
    """Of each span in the loss; none where all weigh 1."""


class Fields(NamedTuple):
    batch: dict[str, Any]
    """The fields of a Batch."""
    numbers: torch.Tensor
    """int64: the number in it of each document; a row's are next to each other."""
    documents_N: torch.Tensor
    """int64: the document of each trained token."""


@dataclass(frozen=True)
class Kind:
    """How rows of a store are batched."""

    sides: int
    """Documents of a row in one batch: a pack holds so many times data.max_length tokens."""
    parts: int
    """Batches of the same shape that a row's documents are dealt out to."""
    documents: Callable[[Rows, int, int, int, bool], list[Document]]
    """Of a row, its partner (another row), max_length, and whether answers share their request where they can."""
    batch: Callable[[list[Fields], np.ndarray, np.ndarray, Rows], Batch]
    """From the fields of each part, the rows, their partners and the store."""
    shares: bool = False
    """Whether a row's documents can share their request."""


def _conversation(store: Rows, row: int, partner: int, max_length: int, share: bool) -> list[Document]:
    return [Document(*store.row(row), weights=store.weights(row))]


def _text(store: Rows, row: int, partner: int, max_length: int, share: bool) -> list[Document]:
    return [Document(*store.row(row))]


def _pair(store: Rows, row: int, partner: int, max_length: int, share: bool) -> list[Document]:
    prompt, chosen, rejected = store.row(row)
    if share:
        return [_answered(prompt, chosen), Document(rejected, np.array([0, len(rejected)], np.int32), len(prompt))]
    return [_answered(prompt, chosen), _answered(prompt, rejected)]


def _labeled(store: Rows, row: int, partner: int, max_length: int, share: bool) -> list[Document]:
    prompt, answer = store.row(row)
    _, other = store.row(partner)
    source, target = shares(len(prompt), len(other), max_length)
    if len(prompt) + len(other) <= max_length:
        source, target = len(prompt), len(other)
    return [_answered(prompt, answer), _answered(prompt[:source], other[:target])]


def _answered(prompt: np.ndarray, answer: np.ndarray) -> Document:
    return Document(np.concatenate([prompt, answer]), np.array([len(prompt), len(prompt) + len(answer)], np.int32))


def _plain_batch(made: list[Fields], rows: np.ndarray, partners: np.ndarray, store: Rows) -> Batch:
    return Batch(**made[0].batch)


def _pair_batch(made: list[Fields], rows: np.ndarray, partners: np.ndarray, store: Rows) -> PairBatch:
    (both,) = made
    return PairBatch(
        **both.batch,
        documents_N=both.documents_N,
        chosen_P=both.numbers[0::2].contiguous(),
        rejected_P=both.numbers[1::2].contiguous(),
        margin_P=torch.from_numpy(store.margins[rows]),
        rows=tuple(rows.tolist()),
    )


def _labeled_batch(made: list[Fields], rows: np.ndarray, partners: np.ndarray, store: Rows) -> LabeledBatch:
    own, other = made
    return LabeledBatch(
        **{**own.batch, "attention_pairs": own.batch["attention_pairs"] + other.batch["attention_pairs"]},
        documents_N=own.documents_N,
        answers_P=own.numbers,
        mismatched=AnswerBatch(**other.batch, documents_N=other.documents_N, answers_P=other.numbers),
        desirable_P=torch.from_numpy(store.desirable[rows]),
        rows=tuple(rows.tolist()),
        partners=tuple(partners.tolist()),
    )


KINDS = {
    "conversations": Kind(1, 1, _conversation, _plain_batch),
    "text": Kind(1, 1, _text, _plain_batch),
    "pairs": Kind(2, 1, _pair, _pair_batch, shares=True),
    "labeled": Kind(1, 2, _labeled, _labeled_batch),
}


def collate(
    lines: Sequence[Sequence[tuple[Any, ...]]],
    *,
    length: int,
    pad_id: int,
    sample_ids: tuple[int, ...] = (),
    end_of_row: int | None = None,
) -> Batch:
    """Documents end to end, one list a row of the batch, each row padded to `length` tokens."""
    return Batch(**fields(lines, length=length, pad_id=pad_id, sample_ids=sample_ids, end_of_row=end_of_row).batch)


def fields(
    lines: Sequence[Sequence[tuple[Any, ...]]],
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
    ids_L = np.full(len(lines) * length, pad_id, np.int64)
    positions_L = np.zeros(len(lines) * length, np.int64)
    documents = [[Document(*document) for document in line] for line in lines]
    longest = max((len(one.ids) for line in documents for one in line), default=0) or min(length, PADDING_DOCUMENT)
    ramp = np.arange(max((len(one.ids) + one.prefix for line in documents for one in line), default=longest))
    boundaries, numbers, counts, attention_pairs = [0], [], [], 0
    trained, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    weights: list[float] = []
    """Of each trained range."""
    prefixed: list[tuple[int, int, int, int]] = []
    """Start and end of each document that goes on from another, and of what it goes on from."""
    for number, line in enumerate(documents):
        before, at = 0, number * length
        for ids, spans, prefix, of_spans in line:
            end = at + len(ids)
            weights.extend(of_spans if len(of_spans) else [1.0] * (len(spans) // 2))
            ids_L[at:end] = ids
            positions_L[at:end] = ramp[prefix : prefix + len(ids)]
            attention_pairs += len(ids) * (len(ids) + 1) // 2 + len(ids) * prefix
            count = 0
            for start, stop in spans.reshape(-1, 2).tolist():
                start = start if prefix else max(start, 1)  # nothing predicts the first token
                trained.append(np.arange(at + start - 1, at + stop - 1))
                if start == 0:
                    trained[-1][0] = before + prefix - 1
                targets.append(ids[start:stop].astype(np.int64))
                if end_of_row is not None:
                    targets[-1][-1] = end_of_row
                count += stop - start
            if prefix:
                prefixed.append((at, end, before, before + prefix))
            counts.append(count)
            numbers.append(len(boundaries) - 1)
            boundaries.append(end)
            before, at = at, end
        while at < (number + 1) * length:
            end = min(at + longest, (number + 1) * length)
            positions_L[at:end] = ramp[: end - at]
            boundaries.append(end)
            at = end
    weighted = any(len(one.weights) for line in documents for one in line)
    weights_N = np.repeat(np.array(weights, np.float32), [len(part) for part in targets[1:]]) if weighted else None
    numbers_M = torch.tensor(numbers, dtype=torch.int64)
    return Fields(
        {
            "ids_BT": torch.from_numpy(ids_L).view(len(lines), length),
            "positions_BT": torch.from_numpy(positions_L).view(len(lines), length),
            "trained_N": torch.from_numpy(np.concatenate(trained)),
            "targets_N": torch.from_numpy(np.concatenate(targets)),
            "weights_N": None if weights_N is None else torch.from_numpy(weights_N),
            "cu_seqlens_S": torch.tensor(boundaries, dtype=torch.int32),
            "max_seqlen": longest,
            "prefixes": _prefixes(np.array(prefixed)) if prefixed else None,
            "attention_pairs": attention_pairs,
            "sample_ids": sample_ids,
        },
        numbers_M,
        numbers_M.repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
    )


def _prefixes(ranges_X4: np.ndarray) -> Prefixes:
    """From the ranges of own tokens and of those before them."""

    def flat(starts: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        lengths = ends - starts
        return torch.from_numpy(positions), torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)), int(lengths.max())

    queries_Q, cu_queries_X, max_queries = flat(ranges_X4[:, 0], ranges_X4[:, 1])
    keys_K, cu_keys_X, max_keys = flat(ranges_X4[:, 2], ranges_X4[:, 3])
    return Prefixes(queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys)


def moved(batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The batch with each of its tensors moved, those of batches in it among them."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    batches = {name: moved(value, move) for name, value in values.items() if isinstance(value, Batch)}
    if batch.prefixes is not None:
        queries, keys, cu_queries, cu_keys, *longest = batch.prefixes
        tensors["prefixes"] = Prefixes(move(queries), move(keys), move(cu_queries), move(cu_keys), *longest)
    return dataclasses.replace(batch, **tensors, **batches)


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, from which copies to a GPU do not wait."""
    return moved(batch, torch.Tensor.pin_memory)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """From page-locked memory without a wait; on a CPU, the batch itself."""
    return batch if device.type == "cpu" else moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
