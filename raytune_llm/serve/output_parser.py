"""A streaming parser of generated text: reasoning, content and tool calls.

How a model writes reasoning and tool calls follows from its chat template: `OutputSyntax.of` detects it in the template's source,
and `parser_of` makes the parser.
All parts are returned as they arrive. Text that may turn out to be the start of a tool call or of a reasoning tag is held back
until that is decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raytune_llm.serve.answer_parser import AnswerParser, Names, OutputPart, pending_length
from raytune_llm.serve.call_parser import FORCED_CALL, CallParser, CallSyntax, call_syntax_of
from raytune_llm.serve.harmony_parser import MESSAGE, THOUGHT, WORDS, HarmonyParser, HarmonySyntax

THOUGHTS: tuple[tuple[str, str, str], ...] = (
    # A text in the template's source, and the tags around reasoning that it indicates.
    ("<seed:think>", "<seed:think>", "</seed:think>"),
    ("◁think▷", "◁think▷", "◁/think▷"),
    ("[THINK]", "[THINK]", "[/THINK]"),
    ("<|channel>thought", "<|channel>thought\n", "<channel|>"),
    ("<think>", "<think>", "</think>"),
    ("</think>", "<think>", "</think>"),
)


@dataclass(frozen=True, slots=True)
class OutputSyntax:
    calls: CallSyntax | None = None
    """How the model writes tool calls. None: they are not parsed."""
    think: tuple[str, str] | None = None
    """The tags around reasoning. None: the model writes none."""
    starts_thinking: bool = False
    """The prompt ends after the opening tag, so that the answer starts with reasoning."""
    harmony: HarmonySyntax | None = None
    """The model writes this format, whose thoughts and calls are messages of their own."""

    @classmethod
    def of(cls, template: str, *, prompt: str = "", tools: bool = False) -> OutputSyntax:
        """Detect the syntax. template: the chat template's source; prompt: the rendered prompt; tools: the request has tools."""
        if (harmony := HarmonySyntax.of(template, prompt, tools=tools)) is not None:
            return cls(harmony=harmony)
        think = next(((start, end) for sign, start, end in THOUGHTS if sign in template), None)
        starts = think is not None and prompt.rstrip().endswith(think[0].rstrip())
        return cls(call_syntax_of(template) if tools else None, think, starts)

    def under_grammar(self, *, is_call: bool) -> OutputSyntax:
        """The syntax of answers that a grammar shapes, after `thought_before_grammar`. is_call: they are one call."""
        calls, thought = FORCED_CALL if is_call else self.calls, self.thought_before_grammar
        return OutputSyntax(calls, thought if self.harmony is not None else self.think if thought else None, self.starts_thinking)

    @property
    def thought_before_grammar(self) -> tuple[str, str] | None:
        """What stands around reasoning that comes before an answer which a grammar shapes. None: no reasoning comes."""
        if self.harmony is not None:
            return None if self.harmony.begun.endswith(MESSAGE) else THOUGHT
        return ("", self.think[1]) if self.think is not None and self.starts_thinking else None

    @property
    def words(self) -> tuple[str, ...]:
        """Texts that the parser looks for, which may be special tokens of a tokenizer."""
        own = () if self.harmony is None else WORDS
        return (*own, *(self.think or ()), *(self.calls.words if self.calls is not None else ()))


@dataclass(slots=True)
class OutputParser(AnswerParser):
    """Parses reasoning between tags, and calls between words."""

    syntax: OutputSyntax
    _thinking: bool = field(init=False)
    _begun: bool = False
    """Content or reasoning has been returned; a reasoning tag after that is content."""
    _trims: str = field(init=False)
    """Characters that are dropped at the start of the held text: they belong to the tag before it."""
    _call_parser: CallParser | None = None
    """Reads the text of calls that have begun."""
    _calls_may_come: bool = field(init=False)

    def __post_init__(self) -> None:
        self._thinking = self.syntax.starts_thinking
        self._trims = "\n" if self._thinking else ""
        self._calls_may_come = self.syntax.calls is not None

    def _step(self, parts: list[OutputPart], final: bool) -> bool:
        if self._call_parser is not None:
            return self._read_calls(parts, self._call_parser, final)
        self._held = self._held.lstrip(self._trims) if self._trims else self._held
        if not self._held:
            return False
        self._trims = ""
        if self._thinking:
            assert self.syntax.think is not None
            parts += self._until(self.syntax.think[1], final)
            return not self._thinking
        if self.syntax.think is not None and not self._begun:
            tag, beginning = self.syntax.think[0], self._held.lstrip()
            if beginning.startswith(tag):
                self._held, self._thinking, self._trims = beginning[len(tag) :], True, "\n"
                return True
            if not final and tag.startswith(beginning):
                return False  # it may be the start of a reasoning tag
        self._begun = True
        return self._content(parts, final)

    def _content(self, parts: list[OutputPart], final: bool) -> bool:
        """Content up to the start of a call."""
        held, start, keep = self._held, None, 0
        if self._calls_may_come and (calls := self.syntax.calls) is not None:
            if calls.start is None:
                start = 0
            elif (found := held.find(calls.start)) >= 0:
                start = found
            else:
                keep = 0 if final else pending_length(held, calls.start)
            if start is not None:
                self._call_parser = CallParser(calls, self.names)
        content = held[: len(held) - keep] if start is None else held[:start].rstrip()
        self._held = held[len(held) - keep :] if start is None else held[start:]
        parts += [OutputPart("content", content)] if content else []
        return start is not None

    def _read_calls(self, parts: list[OutputPart], parser: CallParser, final: bool) -> bool:
        parts += parser.push(self._held)
        self._held = ""
        if final and not parser.ended:
            parts += parser.finish()
        if not final and not parser.ended:
            return False
        self._call_parser, self._held = None, parser.rest
        self._calls_may_come = parser.syntax.start is not None
        self._trims = "" if parser.syntax.start is None else " \t\r\n"
        return True

    def _until(self, tag: str, final: bool) -> list[OutputPart]:
        """Reasoning up to `tag`, which ends it."""
        at = self._held.find(tag)
        if at >= 0:
            text, self._held = self._held[:at].rstrip("\n"), self._held[at + len(tag) :]
            self._thinking, self._begun, self._trims = False, True, "\n"
        else:
            keep = 0 if final else pending_length(self._held, tag)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [OutputPart("reasoning", text)] if text else []


def parser_of(syntax: OutputSyntax, names: Names) -> AnswerParser:
    return OutputParser(syntax, names) if syntax.harmony is None else HarmonyParser(syntax.harmony, names)
