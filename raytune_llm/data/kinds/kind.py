"""A kind of row: its columns in a token store, how it is made from a record, and its documents in a batch.

Arrays are numpy's: workers that make stores do not load torch.
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
    from raytune_llm.data.templates.render import Rendered
    from raytune_llm.data.tokens.tokenize import Tokens
    from raytune_llm.records import Record

Ids = Sequence[int] | np.ndarray
MappedShard = Mapping[str, Any]
"""Of some rows: (offsets, flat values) of each column of lists, and the values of any other column."""


class Column(NamedTuple):
    """Of a store: a list of numbers a row, or one number a row."""

    dtype: Any
    is_list: bool = True


IDS = Column(np.int32)


class Document(NamedTuple):
    """A sequence that attends only to itself, and, if it shares a prompt, to the start of the document before it."""

    ids: np.ndarray
    spans: np.ndarray
    """Trained ranges, flattened: start, end, start, end, ..."""
    prefix: int = 0
    """Number of first tokens of the previous document that precede its own (the shared prompt)."""
    weights: Sequence[float] | np.ndarray = ()
    """Loss weight of each span; empty if all are 1."""
    adapter: int = -1
    """The number of its adapter if there are several; -1 for none."""


class Place(NamedTuple):
    """A row of a sample, or a piece of one."""

    row: int
    partner: int
    """Another row, for kinds whose rows are compared with one."""
    start: int
    length: int
    """Of the piece, in tokens."""


@dataclass(frozen=True)
class Targets:
    """How rows are shortened, and which of their tokens are trained."""

    max_length: int
    overlong: str
    mask_history: bool = False
    train_on_prompt: bool = False
    preserve_thinking: bool = False
    end_of_row: int | None = None
    """The id after a row's last answer, trained at the end of each, where the template writes no end of its own."""
    text_start: int | None = None
    text_end: int | None = None
    """The ids before and after each plain text."""
    texts_whole: bool = False
    """Plain texts may be of any length: they are packed end to end."""


class Kind(ABC):
    """A row is a NamedTuple whose fields are the columns, in their order."""

    row: ClassVar[type[Any]]
    columns: ClassVar[Mapping[str, Column]]
    renders_chat: ClassVar[bool] = True
    """Rows are rendered by a chat template."""
    ranked: ClassVar[bool] = False
    """A row holds two answers, the first preferred, as `ranking: true` says in a dataset_info.json."""
    sides: ClassVar[int] = 1
    """Documents of a row in one batch: a pack holds so many times data.max_length tokens."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Batches of the same rows and shape that come with each batch (Batch.beside): a row has a document more for each."""
    has_partners: ClassVar[bool] = False
    """The documents in `beside` are made with another row."""
    can_share_prompts: ClassVar[bool] = False
    """A row's documents can share their prompt."""
    end_to_end: ClassVar[bool] = False
    """Packs hold rows end to end, cut where a pack is full: every token of a piece but its first is trained, and counts 1."""
    judges_answers: ClassVar[bool] = False
    """A loss over it is one of whole answers, each a document: batches say which document is whose."""

    # From a record to a row

    def targets(self, common: Targets, tokenizer: PreTrainedTokenizerFast, *, packing: bool) -> Targets:
        """With what is this kind's own."""
        return common

    @abstractmethod
    def render(self, record: Record, renderer: Any, targets: Targets) -> tuple[Rendered, ...]:
        """The texts that a row is made from. Raises BadRow or RefusedRow."""

    def keeps_last_answer(self, targets: Targets) -> bool:
        """Whether the last answer is what a row is there for, and turns before it go first where it is too long; else those after
        its first trained answer do."""
        return True

    @abstractmethod
    def make(
        self, record: Record, rendered: tuple[Rendered, ...], tokens: Sequence[Tokens], targets: Targets, *, cut: bool = False
    ) -> Any:
        """The row. Raises BadRow if nothing is left to train, TooLong if it is too long.

        cut: then its tokens are cut by the rule of tokens/truncation.py instead.
        """

    # Lengths

    @abstractmethod
    def lengths(self, shard: MappedShard) -> np.ndarray:
        """int: tokens of each row in one batch, every document with its prompt."""

    @abstractmethod
    def trained(self, shard: MappedShard) -> np.ndarray:
        """int: trained tokens of each row that have a predecessor to be predicted from."""

    @abstractmethod
    def counts(self, shard: MappedShard) -> np.ndarray:
        """int64 or float64: what a loss over each row is divided by."""

    def sizes(
        self, store: Rows, rows: np.ndarray, partners: np.ndarray, *, max_length: int, share_prompts: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """int64: tokens of these rows in all their batches, and what they take of a pack."""
        lengths = store.lengths[rows].astype(np.int64)
        return lengths, lengths

    def remarks(self, store: Rows) -> tuple[str, ...]:
        """What a user should know of these rows before training on them."""
        return ()

    # From a row to a batch

    @abstractmethod
    def documents(self, store: Rows, place: Place, *, max_length: int, share_prompts: bool) -> list[Document]:
        """`sides` of them for the batch, then one for each in `beside`."""

    def per_answer(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """Columns of a batch beside its tokens, a value a row: [P, ...]."""
        return {}

    def media(self, store: Rows, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """What else a batch of these rows holds, for the model alone to understand: pixels, say."""
        return {}

    # Prompts

    @abstractmethod
    def prompt_and_answer(self, row: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids of what the row asks, and of what stands there as the answer."""


def sizes_of(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """How long each list is."""
    offsets, _ = lists
    return np.diff(offsets)


def ones(lists: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int64: 1 for each list."""
    offsets, _ = lists
    return np.ones(len(offsets) - 1, np.int64)
