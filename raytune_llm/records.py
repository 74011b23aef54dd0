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
    X  documents that share their prompt with another
    A  all rows of a global batch
    K  values of a row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is decided in data/formats/ and nowhere else."""

    role: Role
    content: str
    trained: bool = False
    weight: float = 1.0
    """Weight of its tokens in the loss, if it is trained."""
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as they were written: {"name", "arguments"}, or that as `function` of an object with an id. Arguments are an object
    or its JSON text."""
    written: Mapping[str, Any] | None = field(default=None, compare=False)
    """The whole message as it was written, for chat templates that read more of it (ids and names of tool calls and results, null
    in place of a content); none where the row has another form."""


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
    """One prompt and two answers, the first preferred."""

    prompt: Conversation
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float = 0.0
    """By how much the chosen answer should score higher, in a reward model's units."""


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


def with_messages(record: Record, change: Callable[[Message], Message]) -> Record:
    """The record with all its messages changed; plain text has none."""

    def within(conversation: Conversation) -> Conversation:
        return replace(conversation, messages=tuple(map(change, conversation.messages)))

    match record:
        case Conversation():
            return within(record)
        case Labeled():
            return replace(record, conversation=within(record.conversation))
        case Pair():
            chosen, rejected = (tuple(map(change, side)) for side in (record.chosen, record.rejected))
            return replace(record, prompt=within(record.prompt), chosen=chosen, rejected=rejected)
    return record


def last_answer_only(conversation: Conversation) -> Conversation:
    """The conversation with only its last message trained, if that was trained."""
    *earlier, last = conversation.messages
    untrained = (replace(message, trained=False) if message.trained else message for message in earlier)
    return replace(conversation, messages=(*untrained, last))


class Prefixes(NamedTuple):
    """Documents that share their prompt with another one: they attend to its first tokens as if these were their own.

    So a shared prompt is computed once, and no answer attends to another. Positions are flat, b * T + t.
    """

    queries_Q: Tensor
    """int64: positions of these documents' own tokens, one document after another."""
    keys_K: Tensor
    """int64: positions of the tokens that come before them, in the same order."""
    cu_queries_X: Tensor
    """int32: where each document begins in queries_Q, and the end."""
    cu_keys_X: Tensor
    max_queries: int
    """Length of the longest document in tokens."""
    max_keys: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees. Attention never crosses a document's boundary, but for a shared prompt.

    Document d covers positions cu_seqlens_S[d] to cu_seqlens_S[d + 1] of the flattened batch. Padding counts as documents, so
    there are S - 1. What a stage, an enricher or a model also reads is in maps by name. Everything is known on the CPU side, so
    no step waits for a device.
    """

    ids_BT: Tensor
    """int64."""
    positions_BT: Tensor
    """int64: in the document."""
    trained_N: Tensor
    """int64: flat positions b * T + t that predict targets_N, document by document. A position of a shared prompt is there
    for each document that predicts from it."""
    targets_N: Tensor
    """int64: the tokens after them in their documents, so that no target is in another document."""
    cu_seqlens_S: Tensor
    """int32: the boundaries of the documents, from 0 to B * T."""
    max_seqlen: int
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each. weights: float32, what a token counts in the loss; absent where all count 1. documents: int64, each token's
    document, where a loss is one of whole answers."""
    per_answer: Mapping[str, Tensor] = field(default_factory=dict)
    """[P, ...] each. documents: int64 [P, sides], those of a pair (chosen, rejected) or of a single answer; there may be none (a
    micro-batch of padding). Then what a kind of row says (margins, desirable), and what enrichers add (reference, numbers of the
    whole global batch)."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """From the rows to the model, untouched: pixels, say."""
    beside: Mapping[str, Batch] = field(default_factory=dict)
    """Batches of the same rows that only some losses run. mismatched: the prompts of labelled answers with answers of other
    rows."""
    adapter_M: Tensor | None = None
    """int64 [S - 1]: the number of each document's adapter, -1 for none. None: the adapter in use is for all documents."""
    prefixes: Prefixes | None = None
    count: int | float = 0
    """The divisor of its loss, if it were a step by itself: trained tokens times weights, or pairs, or labelled rows."""
    attention_pairs: int = 0
    """Query-key pairs of a layer: a token and itself or one before it in its document, without padding, with the batches
    beside."""
    sample_ids: tuple[int, ...] = ()
    """The samples (packs or rows, by their number in the train split) that are in it."""
    rows: tuple[int, ...] = ()
    """Rows of the store whose documents are in the batch, in order."""
    partners: tuple[int, ...] = ()
    """For each row, the row whose answer is paired with its prompt as a mismatch, if there is one."""
    seed: int = 0
    """The step's seed, from which random numbers of each document are derived."""

    def with_answers(self, columns: Mapping[str, Tensor]) -> Batch:
        """The batch with more columns in per_answer."""
        return replace(self, per_answer={**self.per_answer, **columns})


@dataclass(frozen=True, slots=True)
class LossOut:
    """A sum and its divisor, never a mean. Metrics are (sum, count) pairs as well."""

    total: Tensor
    """[]: the sum over this micro-batch, with its gradient."""
    count: Tensor | int
    """Trained tokens times weights, or pairs, or labelled rows: over micro-batches and workers they add up to the divisor."""
    metrics: Mapping[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)
    """Without gradient."""
