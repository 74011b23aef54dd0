"""Assembles batches from documents, and moves them to a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from raytune_llm.data.kinds.kind import Document, Kind, Rows
from raytune_llm.records import Batch, Prefixes

PADDING_DOCUMENT = 64
"""Length of a padding document in a batch without real documents."""
Line = Sequence[Document]
"""The documents of one row of a batch."""


def assemble(
    store: Rows,
    lines: Sequence[Line],
    rows: np.ndarray,
    partners: np.ndarray,
    *,
    length: int,
    pad_id: int,
    sample_ids: tuple[int, ...],
    count: int | float,
    in_lines: bool = False,
) -> Batch:
    """The batch of these rows of a store, or of pieces of them.

    lines: the documents of each row of the batch. length: tokens of each row of the batch, padding included. count: the number
    that the batch's loss is divided by. in_lines: each document gets a row of the batch for itself.
    """
    kind = store.kind
    own, *others = (
        _collated(
            _a_line_each(part) if in_lines else part,
            length=length,
            pad_id=pad_id,
            sample_ids=sample_ids,
            end_of_row=store.end_of_row,
        )
        for part in dealt(kind, lines)
    )
    batches = [own.batch, *(other.batch for other in others)]
    if kind.judges_answers:
        batches = [_answers(one, kind.sides if one is own else 1) for one in (own, *others)]
    batch, *beside = batches
    return dataclasses.replace(
        batch,
        per_answer={**batch.per_answer, **_tensors(kind.per_answer(store, rows))},
        media=_tensors(kind.media(store, rows)),
        beside=dict(zip(kind.beside, beside, strict=True)),
        count=count,
        attention_pairs=sum(one.attention_pairs for one in batches),
        rows=tuple(rows.tolist()),
        partners=tuple(partners.tolist()) if kind.has_partners else (),
    )


def dealt(kind: Kind, lines: Sequence[Line]) -> list[Sequence[Line]]:
    """The lines of the batch, and of each batch in `kind.beside`. The documents of a row of the store are consecutive."""
    if not kind.beside:
        return [lines]
    each = kind.sides + len(kind.beside)
    own = [[document for number, document in enumerate(line) if number % each < kind.sides] for line in lines]
    return [own, *([line[place::each] for line in lines] for place in range(kind.sides, each))]


def _a_line_each(lines: Sequence[Line]) -> Sequence[Line]:
    return [[document] for line in lines for document in line] or [[]]


def collate(
    lines: Sequence[Sequence[tuple[Any, ...]]],
    *,
    length: int,
    pad_id: int,
    sample_ids: tuple[int, ...] = (),
    end_of_row: int | None = None,
) -> Batch:
    """A batch with one list of documents per row, each row padded to `length` tokens."""
    documents = [[Document(*document) for document in line] for line in lines]
    return _collated(documents, length=length, pad_id=pad_id, sample_ids=sample_ids, end_of_row=end_of_row).batch


class _Collated(NamedTuple):
    batch: Batch
    numbers: np.ndarray
    """int64: the index in the batch of each document that is not padding."""
    trained: np.ndarray
    """int64: the number of trained tokens of each of these documents."""


def _collated(
    lines: Sequence[Line], *, length: int, pad_id: int, sample_ids: tuple[int, ...], end_of_row: int | None
) -> _Collated:
    """Padding consists of separate documents, none longer than the longest real one, so that it does not determine max_seqlen.

    end_of_row: if given, this token replaces the last target of every trained span.
    """
    ids_L = np.full(len(lines) * length, pad_id, np.int64)
    positions_L = np.zeros(len(lines) * length, np.int64)
    longest = max((len(one.ids) for line in lines for one in line), default=0) or min(length, PADDING_DOCUMENT)
    ramp = np.arange(max((len(one.ids) + one.prefix for line in lines for one in line), default=longest))
    boundaries, numbers, counts, attention_pairs = [0], [], [], 0
    trained, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    weights: list[float] = []
    """The loss weight of each trained span."""
    adapters: list[int] = []
    prefixed: list[tuple[int, int, int, int]] = []
    """Start and end of each document that shares a prompt, and start and end of the prompt."""
    for number, line in enumerate(lines):
        before, at = 0, number * length
        for document in line:
            size, prefix = len(document.ids), document.prefix
            end = at + size
            ids_L[at:end] = document.ids
            positions_L[at:end] = ramp[prefix : prefix + size]
            attention_pairs += size * (size + 1) // 2 + size * prefix
            counts.append(_add_trained(document, at, before, end_of_row, trained, targets))
            weights.extend(document.weights if len(document.weights) else [1.0] * (len(document.spans) // 2))
            if prefix:
                prefixed.append((at, end, before, before + prefix))
            numbers.append(len(boundaries) - 1)
            boundaries.append(end)
            adapters.append(document.adapter)
            before, at = at, end
        while at < (number + 1) * length:
            end = min(at + longest, (number + 1) * length)
            positions_L[at:end] = ramp[: end - at]
            boundaries.append(end)
            adapters.append(-1)
            at = end
    weighted = any(len(one.weights) for line in lines for one in line)
    weights_N = np.repeat(np.array(weights, np.float32), [len(part) for part in targets[1:]]) if weighted else None
    batch = Batch(
        ids_BT=torch.from_numpy(ids_L).view(len(lines), length),
        positions_BT=torch.from_numpy(positions_L).view(len(lines), length),
        trained_N=torch.from_numpy(np.concatenate(trained)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        cu_seqlens_S=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=longest,
        per_token={} if weights_N is None else {"weights": torch.from_numpy(weights_N)},
        adapter_M=torch.tensor(adapters) if max(adapters) >= 0 else None,
        prefixes=_prefixes(np.array(prefixed)) if prefixed else None,
        attention_pairs=attention_pairs,
        sample_ids=sample_ids,
    )
    return _Collated(batch, np.array(numbers, np.int64), np.array(counts, np.int64))


def _add_trained(
    document: Document,
    at: int,
    before: int,
    end_of_row: int | None,
    positions: list[np.ndarray],
    targets: list[np.ndarray],
) -> int:
    """Append, for each trained span of a document, the flat positions that predict its tokens, and these tokens: int64 both.
    Returns the number of tokens.

    at: where the document begins. before: where the document before it begins, whose prompt it may share.
    """
    ids, prefix, count = document.ids, document.prefix, 0
    for start, stop in document.spans.reshape(-1, 2).tolist():
        start = start if prefix else max(start, 1)  # no token predicts the first one
        positions.append(np.arange(at + start - 1, at + stop - 1))
        if start == 0:
            positions[-1][0] = before + prefix - 1  # the last token of the shared prompt
        targets.append(ids[start:stop].astype(np.int64))
        if end_of_row is not None:
            targets[-1][-1] = end_of_row
        count += stop - start
    return count


def _answers(collated: _Collated, sides: int) -> Batch:
    """The batch with the documents of each answer, and the document of each trained token."""
    batch, numbers, trained = collated
    return dataclasses.replace(
        batch,
        per_token={**batch.per_token, "documents": torch.from_numpy(np.repeat(numbers, trained))},
        per_answer={"documents": torch.from_numpy(numbers.reshape(-1, sides))},
    )


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _prefixes(ranges_X4: np.ndarray) -> Prefixes:
    """The Prefixes of X documents, each given as (start, end) of its own tokens and (start, end) of its shared prompt."""

    def flat(starts: np.ndarray, ends: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        lengths = ends - starts
        return torch.from_numpy(positions), torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)), int(lengths.max())

    queries_Q, cu_queries_X, max_queries = flat(ranges_X4[:, 0], ranges_X4[:, 1])
    keys_K, cu_keys_X, max_keys = flat(ranges_X4[:, 2], ranges_X4[:, 3])
    return Prefixes(queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys)


def moved(batch: Batch, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with `move` applied to every tensor, including those in its maps and in `beside`."""

    def all_of(value: Any) -> Any:
        match value:
            case torch.Tensor():
                return move(value)
            case Prefixes(queries, keys, cu_queries, cu_keys):
                return value._replace(
                    queries_Q=move(queries), keys_K=move(keys), cu_queries_X=move(cu_queries), cu_keys_X=move(cu_keys)
                )
            case Batch():
                return moved(value, move)
            case Mapping():
                return {name: all_of(one) for name, one in value.items()}
            case _:
                return value

    return Batch(**{field.name: all_of(getattr(batch, field.name)) for field in dataclasses.fields(batch)})


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
    return moved(batch, torch.Tensor.pin_memory)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, copied asynchronously from page-locked memory; on a CPU the batch itself."""
    return batch if device.type == "cpu" else moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
