"""A streaming parser of harmony, the format of gpt-oss: an answer is a series of messages, each with a header.

    <|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"argument": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>an answer<|return|>

The recipient of a call may also stand before the channel. The prompt ends in `<|start|>assistant`, or in an answer's header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from raytune_llm.serve.answer_parser import AnswerParser, OutputPart, PartKind, pending_length

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ANSWER = f"{START}assistant"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
"""What ends a message. The model may forget to end one before the next."""
WORDS = (START, CHANNEL, MESSAGE, "<|constrain|>", *ENDS[:-1])
THOUGHT = (f"{CHANNEL}analysis{MESSAGE}", f"<|end|>{ANSWER}{CHANNEL}final{MESSAGE}")
"""What stands before a thought, and between it and an answer."""
HEADER_STARTS = (START, CHANNEL, "to=")
RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


@dataclass(frozen=True, slots=True)
class HarmonySyntax:
    begun: str
    """What the prompt holds of the answer's first message."""
    tools: bool
    """Calls are read."""

    @classmethod
    def of(cls, template: str, prompt: str, *, tools: bool) -> HarmonySyntax | None:
        """The syntax, if the template is harmony's; None for another format."""
        return cls(prompt.rpartition(ANSWER)[2], tools) if CHANNEL in template and MESSAGE in template else None


@dataclass(slots=True)
class HarmonyParser(AnswerParser):
    """Holds back a header, and what may be the beginning of a message's end."""

    syntax: HarmonySyntax
    _body: PartKind | None = None
    """What the text is. None: a header."""
    _raw: bool = False
    """The message is returned as it is written: a call that no tool of the request takes."""
    _empty: bool = True
    """No text of the message was returned."""

    def __post_init__(self) -> None:
        self.push(self.syntax.begun)

    def _step(self, parts: list[OutputPart], final: bool) -> bool:
        return self._header(parts, final) if self._body is None else self._message(parts, self._body, final)

    def _header(self, parts: list[OutputPart], final: bool) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        if not any(text.startswith(start) or (not final and start.startswith(text)) for start in HEADER_STARTS):
            self._body, self._raw, self._empty = "content", False, True  # the model writes no headers
            return True
        header, found, rest = self._held.partition(MESSAGE)
        if not found:
            return False
        self._held, self._raw, self._empty = rest, False, True
        recipient = RECIPIENT.search(header)
        if self.syntax.tools and recipient is not None and (self.names is None or recipient[1] in self.names):
            self._body = "arguments"
            parts.append(OutputPart.call(recipient[1]))
        elif "to=" in header:
            self._body, self._raw = "content", True
            parts.append(OutputPart("content", header + MESSAGE))
        else:
            self._body = "reasoning" if f"{CHANNEL}analysis" in header else "content"
        return True

    def _message(self, parts: list[OutputPart], kind: PartKind, final: bool) -> bool:
        found = [(at, end) for end in ENDS if (at := self._held.find(end)) >= 0]
        if not found:
            keep = 0 if final else max(pending_length(self._held, end) for end in ENDS)
            self._give(parts, kind, self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        at, end = min(found)
        after = at if end == START else at + len(end)
        self._give(parts, kind, self._held[: after if self._raw else at])
        if kind == "arguments" and self._empty:
            parts.append(OutputPart("arguments", "{}"))
        self._held, self._body = self._held[after:], None
        return True

    def _give(self, parts: list[OutputPart], kind: PartKind, text: str) -> None:
        if text:
            self._empty = False
            parts.append(OutputPart(kind, text))
