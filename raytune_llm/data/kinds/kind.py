"""The interface of a kind of row (its columns in a token store, how a row is built from a record, and its documents in a batch),
and the rows of a kind in memory-mapped shards.

Arrays are numpy's, since workers that build stores do not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from raytune_llm.data.templates.rendered import Rendered
    from raytune_llm.data.tokens.tokenize import Tokens
    from raytune_llm.records import Record

Ids = Sequence[int] | np.ndarray
MappedShard = Mapping[str, Any]
"""Column -> (offsets, flat values) if it has lists, else its values."""


class Column(NamedTuple):
    """The type of a store's column: a list of numbers per row, or one number."""

    dtype: Any
    is_list: bool = True


IDS = Column(np.int32)


class Document(NamedTuple):
    """A sequence that attends only to itself, and, if it shares a prompt, to the start of the document before it."""

    ids: np.ndarray
    spans: np.ndarray
    """Trained ranges, flattened: start, end, start, end, ..."""
    prefix: int = 0
    """The first tokens of the previous document that come before its own: the length of the shared prompt."""
    weights: Sequence[float] | np.ndarray = ()
    """Loss weight of each span; empty if all are 1."""
    adapter: int = -1
    """Index of its adapter in a batch for several adapters; -1: none."""


class Place(NamedTuple):
    """A row of the store, or a piece of one, in a sample."""

    row: int
    partner: int
    """Another row, for kinds that need one to compare with (KTO)."""
    start: int
    length: int
    """Tokens of the piece."""


@dataclass(frozen=True)
class Targets:
    """Settings on how rows are shortened and which of their tokens are trained."""

    max_length: int
    overlong: str
    mask_history: bool = False
    train_on_prompt: bool = False
    preserve_thinking: bool = False
    end_of_row: int | None = None
    """The token id to train at the end of each answer, if the template itself writes no end token."""
    text_start: int | None = None
    text_end: int | None = None
    """Token ids that are added before and after each plain text."""
    texts_whole: bool = False
    """Plain texts are never shortened, since they are packed end to end."""


class Kind(ABC):
    """A row is a NamedTuple whose fields are the columns, in their order."""

    row: ClassVar[type[Any]]
    columns: ClassVar[Mapping[str, Column]]
    renders_chat: ClassVar[bool] = True
    """Rows are rendered by a chat template."""
    ranked: ClassVar[bool] = False
    """A row has two answers, the first preferred (`ranking: true` in a dataset_info.json)."""
    sides: ClassVar[int] = 1
    """Documents of a row in one batch. A pack holds `sides` times data.max_length tokens."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of further batches with the same rows and shape (Batch.beside); each needs one more document of every row."""
    has_partners: ClassVar[bool] = False
    """The documents in `beside` are built with a second row, the partner."""
    can_share_prompts: ClassVar[bool] = False
    """A row's documents can share their prompt."""
    end_to_end: ClassVar[bool] = False
    """Rows are concatenated and cut where a pack is full; every token of a piece except its first is trained."""
    judges_answers: ClassVar[bool] = False
    """The loss is over whole answers, each of which is a document, so that batches have the documents of each answer."""

    # From a record to a row

    def targets(self, common: Targets, tokenizer: PreTrainedTokenizerFast, *, packing: bool) -> Targets:
        """The settings with those that are specific to this kind."""
        return common

    @abstractmethod
    def render(self, record: Record, renderer: Any, targets: Targets) -> tuple[Rendered, ...]:
        """The rendered texts of a row. Raises BadRow or RefusedRow."""

    def keeps_last_answer(self, targets: Targets) -> bool:
        """True: the last answer is essential, so a row that is too long loses its earlier turns first. False: it loses its later
        turns first, after the first trained answer."""
        return True

    @abstractmethod
    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> Any:
        """The row. Raises BadRow if no token is trained, and TooLong if it is too long.

        cut: cut the tokens of a row that is too long instead, as in tokens/truncation.py.
        """

    # Lengths

    @abstractmethod
    def lengths(self, shard: MappedShard) -> np.ndarray:
        """int [rows]: tokens of each row in one batch, with the prompt counted for every document."""

    @abstractmethod
    def trained(self, shard: MappedShard) -> np.ndarray:
        """int [rows]: trained tokens of each row that have a token before them."""

    @abstractmethod
    def counts(self, shard: MappedShard) -> np.ndarray:
        """int64 or float64 [rows]: each row's part of the number that the loss is divided by."""

    def sizes(
        self, store: Rows, rows: np.ndarray, partners: np.ndarray, *, max_length: int, share_prompts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """int64 [rows], twice: tokens of each row over all its batches, and the room that it takes in a pack."""
        lengths = store.lengths[rows].astype(np.int64)
        return lengths, lengths

    def remarks(self, store: Rows) -> tuple[str, ...]:
        """Lines of text for the user about these rows, before training."""
        return ()

    # From a row to a batch

    @abstractmethod
    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        """The documents of a row: `sides` for the batch, then one for each name in `beside`."""

    def per_answer(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Columns of Batch.per_answer, one value per row: [P, ...]."""
        return {}

    def media(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Columns of Batch.media, such as pixels, which only the model reads."""
        return {}

    # Prompts

    @abstractmethod
    def prompt_and_answer(self, row: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the row's prompt and of its answer."""


class Rows:
    """The rows of memory-mapped shards of one kind, numbered from 0 over all shards."""

    identity: str = ""
    """The hash of a complete store; empty for a store under construction."""

    def __init__(self, kind: Kind, end_of_row: int | None, shards: Sequence[MappedShard]) -> None:
        self.kind = kind
        self.end_of_row = end_of_row
        """The token id that is the last target of every trained span, if the template itself writes no end token."""
        self.shards = list(shards)
        self._first_rows = np.cumsum([0, *(num_rows(shard) for shard in self.shards)]).tolist()
        self.num_rows: int = self._first_rows[-1]
        self._over_shards: dict[str, np.ndarray] = {}

    def only(self, rows: np.ndarray) -> tuple[Rows, np.ndarray]:
        """A Rows with only the shards that these rows are in, and the numbers of the rows in it."""
        first_rows = np.array(self._first_rows)
        shard_of = np.searchsorted(first_rows, rows, side="right") - 1
        used = np.unique(shard_of)
        part = Rows(self.kind, self.end_of_row, [self.shards[shard] for shard in used.tolist()])
        moved = np.zeros(len(first_rows), np.int64)
        moved[used] = np.array(part._first_rows[:-1]) - first_rows[used]
        return part, rows + moved[shard_of]

    def __len__(self) -> int:
        return self.num_rows

    def row(self, number: int) -> Any:
        """The row as the kind's NamedTuple; its lists are views of the mapped file."""
        shard = bisect_right(self._first_rows, number) - 1
        local = number - self._first_rows[shard]
        columns = self.shards[shard]
        return self.kind.row(*(_value(columns[name], local) for name in self.kind.columns))

    def prompt_and_answer(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the row's prompt and of its answer."""
        return self.kind.prompt_and_answer(self.row(number))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [rows]: tokens of each row in one batch, with the prompt counted for every document."""
        return joined([self.kind.lengths(shard) for shard in self.shards], np.int32)

    @cached_property
    def trained(self) -> np.ndarray:
        """int32 [rows]: trained tokens of each row, without a first token, which nothing predicts."""
        return joined([self.kind.trained(shard) for shard in self.shards], np.int32)

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 or float64 [rows]: each row's part of the number that the loss is divided by."""
        return np.concatenate([np.zeros(0, np.int64), *map(self.kind.counts, self.shards)])

    def list_lengths(self, column: str) -> np.ndarray:
        """int64 [rows]: the length of each row's list in this column."""
        return self._once(column, lambda shard: sizes_of(shard[column]).astype(np.int64))

    def numbers(self, column: str) -> np.ndarray:
        """[rows]: the values of a column with one number per row."""
        return self._once(column, lambda shard: shard[column])

    def _once(self, column: str, of_shard: Callable[[MappedShard], np.ndarray]) -> np.ndarray:
        if column not in self._over_shards:
            self._over_shards[column] = np.concatenate([of_shard(shard) for shard in self.shards])
        return self._over_shards[column]


def sizes_of(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The length of each list."""
    offsets, _ = lists
    return np.diff(offsets)


def ones(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int64: 1 for each list."""
    offsets, _ = lists
    return np.ones(len(offsets) - 1, np.int64)


def num_rows(shard: MappedShard) -> int:
    return len(shard["source"])


def joined(arrays: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if len(arrays) else np.zeros(0, dtype)


def _value(column: Any, row: int) -> Any:
    if not isinstance(column, tuple):
        return column[row]
    offsets, values = column
    return values[offsets[row] : offsets[row + 1]]
