"""Kinds of rows: name -> what a row of it is, from its columns in a store to its documents in a batch.

To add one: its file here, and its entry in KINDS. What a format makes of a raw row for it is a record (records.py).
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
