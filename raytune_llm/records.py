"""The nouns that cross rooms.

Tensor shape suffixes, used in names all over the package:
    B  rows of a batch (packs, or one row of joined samples)
    T  tokens of a row
    N  trained positions of a batch, flattened
    V  vocabulary
    D  hidden size
    H  attention heads
    S  boundaries: the documents of a batch plus one
    P  pairs, or labelled rows
    M  documents, one sequence each
    X  documents that go on from the beginning of another
    A  all rows of a global batch
    J, K  values of a row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    Ids = Sequence[int] | ndarray

Role = Literal["system", "user", "assistant", "tool"]
IGNORE = -100
"""The label of a token that is not trained, where labels are written out as other programs have them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is decided in data/formats/ and nowhere else."""

    role: Role
    content: str
    trained: bool = False
    weight: float = 1.0
    """Of its tokens in the loss, where it is trained."""
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as {"name": str, "arguments": JSON object}."""


@dataclass(frozen=True, slots=True)
class Media:
    """References that travel with a conversation: paths, addresses or raw bytes, in the order of their placeholders."""

    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; a system message, if any, comes first."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool declarations as JSON objects, as chat templates take them."""
    media: Media = field(default_factory=Media)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two ways to go on, the first preferred."""

    prompt: Conversation
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float = 0.0
    """By how much it is preferred, in a reward model's scores."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """A conversation and a verdict on its last answer."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, for pre-training."""

    text: str


Record = Conversation | Pair | Labeled | Text


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of a row and the trained ranges in them: spans [start, end), flattened as start, end, start, end, ..."""

    ids: Ids
    spans: Ids
    weights: Sequence[float] | ndarray = ()
    """Of each span in the loss; none where all weigh 1."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """Token ids of a request and of two answers to it, the first preferred."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class LabeledRow:
    """Token ids of a request and of an answer to it, and whether it is a good one."""

    prompt_ids: Ids
    answer_ids: Ids
    desirable: bool


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Token ids of a request, and of the answer that came with it, if any did."""

    prompt_ids: Ids
    answer_ids: Ids


class Prefixes(NamedTuple):
    """Documents that go on from the beginning of another one: they see its first tokens as if they were their own.

    So what several answers share is computed once, and none of them sees another. Positions are flat, b * T + t.
    """

    queries_Q: Tensor
    """int64: positions of these documents' own tokens, one document after another."""
    keys_K: Tensor
    """int64: positions of the tokens that they go on from, in the same order."""
    cu_queries_X: Tensor
    """int32: where each document begins in queries_Q, and the end."""
    cu_keys_X: Tensor
    max_queries: int
    """Of the longest document."""
    max_keys: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees. Attention never crosses a document's boundary, but for what it goes on from.

    trained_N holds the flat positions b * T + t that are to predict the tokens targets_N (the next ones, so no target lies across
    a boundary), document by document; known on the CPU side, so no step waits for a device. A position that several documents go
    on from is there for each of them.
    weights_N is float32, what each of them counts in the loss; none where all count 1.
    cu_seqlens_S are the boundaries of the documents in the flattened batch (int32, from 0 to B * T; padding is a document too).
    attention_pairs counts the query-key pairs of a layer: a token and itself or one before it in its document; padding is left
    out, and what the batch holds of other batches is in it.
    sample_ids name the samples (packs or rows, by their number in the train split) that are in it.
    seed is the step's: what is drawn for a document, not for a batch, starts from it.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    trained_N: Tensor
    targets_N: Tensor
    cu_seqlens_S: Tensor
    max_seqlen: int
    weights_N: Tensor | None = None
    prefixes: Prefixes | None = None
    attention_pairs: int = 0
    sample_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch(Batch):
    """A batch of pairs: each side is a document, of which the answer is trained: both with a copy of the request, or the rejected
    side going on from the request in the chosen one's.

    Documents are numbered by cu_seqlens_S: document d is from cu_seqlens_S[d] to cu_seqlens_S[d + 1], padding among them, S - 1
    in all. Log-probabilities of the trained tokens, in the order of trained_N, become those of answers by adding each to that of
    its document.
    """

    documents_N: Tensor
    """int64: the document of each trained position."""
    chosen_P: Tensor
    """int64: the document of each pair's preferred side. There may be no pair (a micro-batch of padding)."""
    rejected_P: Tensor
    margin_P: Tensor
    """float32: by how much the preferred side's score is to be higher."""
    rows: tuple[int, ...]
    """Each pair's row in the store."""
    reference_P2: Tensor | None = None
    """float32: the reference's log-probabilities of the chosen and the rejected answer, where the stage asks for them."""
    whole_PJ: Tensor | None = None
    """What the stage's coupling says of these pairs in the whole global batch, where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBatch(Batch):
    """A batch of answers, each a document with its request, numbered like PairBatch's."""

    documents_N: Tensor
    """int64: the document of each trained position."""
    answers_P: Tensor
    """int64: the document of each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledBatch(AnswerBatch):
    """A batch of labelled answers.

    With it comes another of the same shape and rows: their requests with the answers of other rows, to estimate how far the
    policy has moved from the reference.
    """

    mismatched: AnswerBatch
    desirable_P: Tensor
    """bool."""
    rows: tuple[int, ...]
    """Each one's row in the store."""
    partners: tuple[int, ...]
    """The row whose answer is the mismatched one."""
    reference_P2: Tensor | None = None
    """float32: the reference's log-probabilities of the answer and of the mismatched one, where the stage asks for them."""
    whole_PJ: Tensor | None = None
    """What the stage's coupling says of these rows in the whole global batch, where it has one."""


@dataclass(frozen=True, slots=True)
class LossOut:
    """A sum and the number that it is to be divided by, never a mean. Metrics are (sum, count) pairs as well."""

    total: Tensor
    count: Tensor | int
    metrics: Mapping[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)
