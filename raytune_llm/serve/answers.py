"""What a model wrote -> thoughts, text and tool calls, while it comes.

A chat template says how a model writes calls and thoughts; `AnswerForm.of` reads that off its source. Calls are told when they
are complete, thoughts and text at once. What may still become the beginning of a call or of a thought is held back.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from raytune_llm.data.templates.tool_calls import ToolCall, beside_calls, extract_calls


@dataclass(frozen=True, slots=True)
class AnswerForm:
    tool_format: str | None = None
    """By LLaMA-Factory's names (data/templates/tool_calls.py)."""
    call_start: str | None = None
    """What a call begins with; None: calls are looked for in the whole answer."""
    think: tuple[str, str] | None = None
    """What encloses thoughts."""
    starts_thinking: bool = False
    """The prompt ends within a thought."""

    @classmethod
    def of(cls, template: str, *, prompt: str = "", tools: bool = False) -> AnswerForm:
        """From a chat template's source and the end of the prompt that it wrote."""
        think = ("<think>", "</think>") if "</think>" in template or "<think>" in template else None
        starts = think is not None and prompt.rstrip().endswith(think[0])
        name, start = next(((name, start) for sign, name, start in TOOL_FORMATS if sign in template), (None, None))
        return cls(name if tools else None, start if tools else None, think, starts)


TOOL_FORMATS: tuple[tuple[str, str, str | None], ...] = (
    # What a template's source holds, the format that it is, and what a call begins with; the surest first.
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
class Part:
    """A piece of the answer."""

    kind: Literal["content", "reasoning", "call"]
    text: str = ""
    call: ToolCall | None = None
    id: str = ""


@dataclass(slots=True)
class AnswerReader:
    form: AnswerForm
    names: frozenset[str] | None = None
    """Tools that may be called; what calls another stays text. None: any."""
    _thinking: bool = field(init=False)
    _begun: bool = False
    """Text came: a thought comes before it."""
    _trims: bool = field(init=False)
    """Newlines that follow belong to the tag before them."""
    _held: str = ""
    _calls: str = ""
    """From the first call's beginning on."""
    calls: int = 0

    def __post_init__(self) -> None:
        self._thinking = self._trims = self.form.starts_thinking

    def push(self, text: str) -> list[Part]:
        return self._read(text, final=False)

    def finish(self) -> list[Part]:
        """What was held back, and the calls."""
        parts = self._read("", final=True)
        rest, self._calls, self._held = self._calls or self._held, "", ""
        if not rest:
            return parts
        found = extract_calls(self.form.tool_format, rest) if self.form.tool_format else rest
        if isinstance(found, str) or (self.names is not None and any(call.name not in self.names for call in found)):
            return [*parts, Part("content", rest)] if rest.strip() or not self.form.tool_format else parts
        self.calls += len(found)
        if said := beside_calls(str(self.form.tool_format), rest):
            parts.append(Part("content", said))
        return [*parts, *(Part("call", call=call, id=f"call_{secrets.token_hex(12)}") for call in found)]

    def _read(self, text: str, *, final: bool) -> list[Part]:
        if self._calls:
            self._calls += text
            return []
        parts: list[Part] = []
        self._held += text
        form = self.form
        while self._held:
            if self._trims:
                self._held = self._held.lstrip("\n")
                self._trims = not self._held
                continue
            if self._thinking:
                assert form.think is not None
                parts += self._until(form.think[1], final)
                if self._thinking:
                    break
                continue
            if form.think is not None and not self._begun:
                beginning = self._held.lstrip()
                if beginning.startswith(form.think[0]):
                    self._held, self._thinking, self._trims = beginning[len(form.think[0]) :], True, True
                    continue
                if not final and form.think[0].startswith(beginning):
                    break  # it may still become a thought
            self._begun = True
            if form.tool_format is not None and form.call_start is None:
                break  # the whole answer is a call or is none: it is known at the end
            start = -1 if form.call_start is None else self._held.find(form.call_start)
            if start >= 0:
                before, self._calls, self._held = self._held[:start].rstrip(), self._held[start:], ""
            else:
                keep = 0 if final or form.call_start is None else _overlap(self._held, form.call_start)
                before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            parts += [Part("content", before)] if before else []
            break
        return parts

    def _until(self, tag: str, final: bool) -> list[Part]:
        """Reasoning, up to the tag that ends it."""
        at = self._held.find(tag)
        if at >= 0:
            told, self._held = self._held[:at].rstrip("\n"), self._held[at + len(tag) :]
            self._thinking, self._begun, self._trims = False, True, True
        else:
            keep = 0 if final else _overlap(self._held, tag)
            told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [Part("reasoning", told)] if told else []


def _overlap(text: str, tag: str) -> int:
    """Characters at the text's end that may become white space and the tag."""
    size = next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
    return len(text) - len(text[: len(text) - size].rstrip())
