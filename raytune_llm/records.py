"""The nouns that cross rooms.

Tensor shape suffixes, used in names all over the package:
    B  rows of a batch (packs, or one row of joined samples)
    T  tokens of a row
    N  trained positions of a batch, flattened
    V  vocabulary
    D  hidden size
    H  attention heads
    S  boundaries: the documents of a batch plus one
    P  pairs
    M  documents, one sequence each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]
IGNORE = -100
"""The label of a position whose next token is not trained."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is decided in data/formats.py and nowhere else."""

    role: Role
    content: str
    trained: bool = False
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

    ids: Sequence[int]
    spans: Sequence[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees. Attention never crosses a document's boundary.

    labels_BT[b, t] is the token that position t is to predict (shifted already, so no label crosses a boundary), or IGNORE.
    trained_N holds the flat positions b * T + t whose label is not IGNORE: known on the CPU side, so no step waits for a device.
    cu_seqlens_S are the boundaries of the documents in the flattened batch (int32, from 0 to B * T; padding is a document too).
    sample_ids name the samples (packs or rows, by their number in the train split) that are in it.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    trained_N: Tensor
    cu_seqlens_S: Tensor
    max_seqlen: int
    sample_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LossOut:
    """A sum and the number that it is to be divided by, never a mean. Metrics are (sum, count) pairs as well."""

    total: Tensor
    count: Tensor | int
    metrics: Mapping[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)
