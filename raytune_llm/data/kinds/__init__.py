"""Kinds of rows. A kind defines the columns of a row in a store, how it is built from a record (records.py), and its documents in
a batch.

To add one, write its file here and enter it in KINDS.
"""

from __future__ import annotations

from raytune_llm.data.kinds.conversations import ConversationKind
from raytune_llm.data.kinds.kind import Kind
from raytune_llm.data.kinds.labeled import LabeledKind
from raytune_llm.data.kinds.pairs import PairKind
from raytune_llm.data.kinds.prompts import PromptKind
from raytune_llm.data.kinds.text import TextKind

KINDS: dict[str, Kind] = {
    "conversations": ConversationKind(),
    "text": TextKind(),
    "pairs": PairKind(),
    "labeled": LabeledKind(),
    "prompts": PromptKind(),
}
