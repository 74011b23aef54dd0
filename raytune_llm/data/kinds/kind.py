"""The interface of a kind of row: its columns in a token store, how a row is built from a record, and its documents in a batch.

Arrays are numpy's, since workers that build stores do not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from raytune_llm.data.store import Rows
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


def sizes_of(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The length of each list."""
    offsets, _ = lists
    return np.diff(offsets)


def ones(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int64: 1 for each list."""
    offsets, _ = lists
    return np.ones(len(offsets) - 1, np.int64)
