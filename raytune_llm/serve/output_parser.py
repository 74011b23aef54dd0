"""A streaming parser of generated text: reasoning, content and tool calls.

How a model writes tool calls and reasoning follows from its chat template: `OutputSyntax.of` detects it in the template's source.
Reasoning and content are returned as they arrive, tool calls once they are complete. Text that may turn out to be the start of a
tool call or of a reasoning tag is held back until that is decided.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from raytune_llm.data.templates.tool_calls import ToolCall, beside_calls, extract_calls


@dataclass(frozen=True, slots=True)
class OutputSyntax:
    tool_format: str | None = None
    """The format of tool calls, by LLaMA-Factory's name (data/templates/tool_calls.py). None: tool calls are not parsed."""
    call_start: str | None = None
    """The text that starts a tool call. None: the format has no such text, and the complete answer is parsed at its end."""
    think: tuple[str, str] | None = None
    """The tags around reasoning. None: the model writes none."""
    starts_thinking: bool = False
    """The prompt ends after the opening tag, so that the answer starts with reasoning."""

    @classmethod
    def of(cls, template: str, *, prompt: str = "", tools: bool = False) -> OutputSyntax:
        """Detect the syntax. template: the chat template's source; prompt: the rendered prompt; tools: the request has tools."""
        think = ("<think>", "</think>") if "</think>" in template or "<think>" in template else None
        starts = think is not None and prompt.rstrip().endswith(think[0])
        name, start = next(((name, start) for sign, name, start in TOOL_FORMATS if sign in template), (None, None))
        return cls(name if tools else None, start if tools else None, think, starts)


TOOL_FORMATS: tuple[tuple[str, str, str | None], ...] = (
    # A text in the template's source, the format that it indicates, and the text that starts a tool call; most specific first.
    ("<tool_call>\\n<function=", "qwen3_5", "<tool_call>"),
    ("<function=", "qwen3_5", "<tool_call>"),
    ("<arg_key>", "glm4_moe", "<tool_call>"),
    ("<seed:tool_call>", "seed_oss", "<seed:tool_call>"),
    ("<minimax:tool_call>", "minimax2", "<minimax:tool_call>"),
    ("<|tool_call_start|>", "lfm2", "<|tool_call_start|>"),
    ("[TOOL_CALLS]", "mistral", "[TOOL_CALLS]"),
    ("<tool_call>", "qwen", "<tool_call>"),
    ("<|python_tag|>", "llama3", None),
    ("Action Input", "default", "Action:"),
)


@dataclass(frozen=True, slots=True)
class OutputPart:
    """A piece of an answer: text of content or reasoning, or one tool call with the id that the API reports."""

    kind: Literal["content", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None
    id: str = ""


@dataclass(slots=True)
class OutputParser:
    """Parses one answer: `push` for each new piece of text, then `finish`."""

    syntax: OutputSyntax
    names: frozenset[str] | None = None
    """The tools of the request; a call of any other tool stays content. None: any tool may be called."""
    _thinking: bool = field(init=False)
    _begun: bool = False
    """Content or reasoning has been returned; a reasoning tag after that is content."""
    _trims: bool = field(init=False)
    """Newlines at the start of the held text belong to the tag before them and are dropped."""
    _held: str = ""
    """Text that has not been returned yet."""
    _calls: str = ""
    """All text from the start of the first tool call."""
    calls: int = 0
    """Tool calls found so far."""

    def __post_init__(self) -> None:
        self._thinking = self._trims = self.syntax.starts_thinking

    def push(self, text: str) -> list[OutputPart]:
        return self._read(text, final=False)

    def finish(self) -> list[OutputPart]:
        """The text that was still held back, and the tool calls."""
        parts = self._read("", final=True)
        rest, self._calls, self._held = self._calls or self._held, "", ""
        if not rest:
            return parts
        found = extract_calls(self.syntax.tool_format, rest) if self.syntax.tool_format else rest
        if isinstance(found, str) or (self.names is not None and any(call.name not in self.names for call in found)):
            return [*parts, OutputPart("content", rest)] if rest.strip() or not self.syntax.tool_format else parts
        self.calls += len(found)
        if said := beside_calls(str(self.syntax.tool_format), rest):
            parts.append(OutputPart("content", said))
        return [*parts, *(OutputPart("call", call=call, id=f"call_{secrets.token_hex(12)}") for call in found)]

    def _read(self, text: str, *, final: bool) -> list[OutputPart]:
        if self._calls:
            self._calls += text
            return []
        parts: list[OutputPart] = []
        self._held += text
        syntax = self.syntax
        while self._held:
            if self._trims:
                self._held = self._held.lstrip("\n")
                self._trims = not self._held
                continue
            if self._thinking:
                assert syntax.think is not None
                parts += self._until(syntax.think[1], final)
                if self._thinking:
                    break
                continue
            if syntax.think is not None and not self._begun:
                beginning = self._held.lstrip()
                if beginning.startswith(syntax.think[0]):
                    self._held, self._thinking, self._trims = beginning[len(syntax.think[0]) :], True, True
                    continue
                if not final and syntax.think[0].startswith(beginning):
                    break  # it may be the start of a reasoning tag
            self._begun = True
            if syntax.tool_format is not None and syntax.call_start is None:
                break  # whether the answer is a tool call is known at its end
            start = -1 if syntax.call_start is None else self._held.find(syntax.call_start)
            if start >= 0:
                before, self._calls, self._held = self._held[:start].rstrip(), self._held[start:], ""
            else:
                keep = 0 if final or syntax.call_start is None else _pending_length(self._held, syntax.call_start)
                before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            parts += [OutputPart("content", before)] if before else []
            break
        return parts

    def _until(self, tag: str, final: bool) -> list[OutputPart]:
        """Reasoning up to `tag`, which ends it."""
        at = self._held.find(tag)
        if at >= 0:
            text, self._held = self._held[:at].rstrip("\n"), self._held[at + len(tag) :]
            self._thinking, self._begun, self._trims = False, True, True
        else:
            keep = 0 if final else _pending_length(self._held, tag)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [OutputPart("reasoning", text)] if text else []


def _pending_length(text: str, tag: str) -> int:
    """Number of characters at the end of `text` that could be the start of `tag`, with the white space before it."""
    size = next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
    return len(text) - len(text[: len(text) - size].rstrip())
