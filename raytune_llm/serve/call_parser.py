"""A streaming parser of tool calls, by the formats of data/templates/tool_calls.py, and of DeepSeek's own.

Where a call is a JSON object of a name and arguments, in this order, its name is returned as soon as it is written, and its
arguments as they come. Calls of other formats are returned when they are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from raytune_llm.data.templates.tool_calls import extract_calls
from raytune_llm.serve.answer_parser import Names, OutputPart

SEPARATORS = re.compile(r"[\s,\[\]]+")
"""What may stand around the JSON objects of calls."""


def _never(text: str, names: Names) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How a model writes calls."""

    format: str
    """The name in data/templates/tool_calls.py, if it has a reader there: of complete calls that `head` does not match."""
    signs: tuple[str, ...] = ()
    """Texts in a chat template's source of which each indicates the format."""
    start: str | None = None
    """The text that starts a call, or several. None: the answer itself is a call if it `may_be_call`."""
    end: str | None = None
    """The text that ends them. None: they end with the answer."""
    head: re.Pattern[str] | None = None
    """Matches the next call up to its arguments, which are a JSON object. Its groups: `name`, or `json_name`, the name as a JSON
    string; `object`, the brace of an object around it. None: calls are read when they are complete."""
    separators: re.Pattern[str] = SEPARATORS
    """What may stand around calls."""
    may_be_call: Callable[[str, Names], bool] = _never
    """Whether an answer that begins so may be a call, of a format without a start."""
    marks: tuple[str, ...] = ()
    """Further texts of the format that may be special tokens of a tokenizer."""

    @property
    def words(self) -> tuple[str, ...]:
        """All texts of the format that may be special tokens."""
        return (*filter(None, (self.start, self.end)), *self.marks)


@dataclass(slots=True)
class CallParser:
    """Parses the part of an answer that holds calls: `push` for each new piece of text, then `finish`, unless it has ended."""

    syntax: CallSyntax
    names: Names
    ended: bool = False
    """The text that ends the calls has come; `rest` is what follows it."""
    rest: str = ""
    number: int = 0
    """Calls returned so far."""
    _text: str = ""
    """What was not returned yet."""
    _brackets: _Brackets | None = None
    """Of the arguments that are being returned, or of the rest of their object."""
    _skips: bool = False
    """The text in these brackets is not returned."""
    _in_object: bool = False
    """The object that holds the arguments is still open."""
    _looked: int = 0
    """Ends before this place were found to end no call."""

    def push(self, text: str) -> list[OutputPart]:
        self._text += text
        parts: list[OutputPart] = []
        while not self.ended and self._step(parts):
            pass
        return parts

    def finish(self) -> list[OutputPart]:
        """The answer has ended. Text that is no call is content."""
        text, self._text = self._text, ""
        if self._brackets is not None or not self.syntax.separators.sub("", text):
            return []
        calls = extract_calls(self.syntax.format, self._with_start(text), marked=True)
        if isinstance(calls, str) and self.syntax.end is not None:  # which may be a token that ends answers
            calls = extract_calls(self.syntax.format, self._with_start(text) + self.syntax.end, marked=True)
        return self._complete(calls, text)

    def _step(self, parts: list[OutputPart]) -> bool:
        """Return what can be returned now. False: more text is needed."""
        if self._brackets is not None:
            return self._arguments(parts, self._brackets)
        if self._in_object:
            return self._close_object()
        if self.syntax.start is None and not self.number and not self.syntax.may_be_call(self._text, self.names):
            parts.append(OutputPart("content", self._text))
            self._text, self.ended = "", True
            return True
        if self.syntax.head is not None and (found := self.syntax.head.match(self._text)):
            groups = found.groupdict()
            name = groups.get("name") or json.loads(groups["json_name"])
            if self._may_call(name):
                parts.append(self._call(name))
                self._text, self._looked = self._text[found.end() :], 0
                self._brackets, self._skips = _Brackets(), False
                self._in_object = groups.get("object") is not None
                return True
        return self._end(parts)

    def _arguments(self, parts: list[OutputPart], brackets: _Brackets) -> bool:
        """Return arguments up to their end, or skip what follows them in their object."""
        end = brackets.end(self._text)
        given, self._text = self._text[:end], "" if end is None else self._text[end:]
        if given and not self._skips:
            parts.append(OutputPart("arguments", given))
        if end is not None:
            self._brackets = None
        return end is not None

    def _close_object(self) -> bool:
        self._text = self._text.lstrip()
        if not self._text:
            return False
        self._in_object = False
        if self._text.startswith("}"):
            self._text = self._text[1:]
        elif self._text.startswith(","):  # another key, such as a call's id
            self._brackets, self._skips = _Brackets(depth=1), True
        return True

    def _end(self, parts: list[OutputPart]) -> bool:
        """Read the calls that are complete."""
        end = self.syntax.end
        if end is None:
            return False
        at = self._text.find(end, self._looked)
        if at < 0:
            self._looked = max(self._looked, len(self._text) - len(end) + 1)
            return False
        block = self._text[: at + len(end)]
        if not self.number or self.syntax.separators.sub("", self._text[:at]):
            calls = extract_calls(self.syntax.format, self._with_start(block), marked=True)
            if isinstance(calls, str) and self.syntax.head is None:
                self._looked = at + len(end)  # a value may hold the text of an end
                return True
            parts += self._complete(calls, block)
        self.rest, self._text, self.ended = self._text[at + len(end) :], "", True
        return True

    def _with_start(self, text: str) -> str:
        start = self.syntax.start or ""
        return text if text.lstrip().startswith(start) else start + text

    def _complete(self, calls: object, text: str) -> list[OutputPart]:
        """The parts of complete calls; of text, if there are none or one is of no tool of the request."""
        if (
            not isinstance(calls, list)
            or not calls
            or any(self.names is not None and one.name not in self.names for one in calls)
        ):
            return [OutputPart("content", text)]
        return [part for one in calls for part in (self._call(one.name), OutputPart("arguments", one.arguments))]

    def _may_call(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _call(self, name: str) -> OutputPart:
        self.number += 1
        return OutputPart.call(name)


@dataclass(slots=True)
class _Brackets:
    """Finds the end of a JSON value with brackets in text that comes in pieces."""

    depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def end(self, text: str) -> int | None:
        """The place in the next piece of text after the bracket that closes the value. None: it goes on."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
            elif character == "<":  # the text that ends calls: the model forgot a bracket
                return place
        return None


def _json_head(arguments: str, *words: str) -> str:
    """A pattern of the beginning of a call that is a JSON object. arguments: its key; words: what may stand before it."""
    before = "|".join([*map(re.escape, words), r"[\s,\[\]]"])
    name = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
    return rf'(?:{before})*(?P<object>\{{)\s*"name"\s*:\s*(?P<json_name>{name})\s*,\s*"{arguments}"\s*:\s*(?=\{{)'


def _is_json(text: str, names: Names) -> bool:
    text = text.lstrip()
    return text[:1] in ("", "{", "[") or PYTHON_TAG.startswith(text[: len(PYTHON_TAG)])


def _begins_with_a_name(text: str, names: Names) -> bool:
    """The first line is the name of a tool, as in glm4."""
    first, newline, _ = text.lstrip().partition("\n")
    return names is None or (first in names if newline else any(name.startswith(first) for name in names))


def _always(text: str, names: Names) -> bool:
    return True


_ARGS_HEAD = r"\s*(?:\[TOOL_CALLS\])?(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)"
"""A call of newer Mistral models."""
_DEEPSEEK_START, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DEEPSEEK_CALL, _DEEPSEEK_CALL_END, _DEEPSEEK_SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_DEEPSEEK_HEAD = (
    rf"(?:{_DEEPSEEK_START}|{_DEEPSEEK_CALL_END}|```|\s)*{_DEEPSEEK_CALL}"
    rf"(?:function{_DEEPSEEK_SEPARATOR}(?!\s*\{{))?(?P<name>[\w.-]+)(?:{_DEEPSEEK_SEPARATOR}|\s*```(?:json)?)\s*(?=\{{)"
)
"""A call of DeepSeek-V3.1, or of V3 and R1, where a type is before the name and the arguments are a block of code."""
PYTHON_TAG = "<|python_tag|>"
CALL_SYNTAXES = (  # the most specific first
    CallSyntax(
        format="deepseek",
        signs=(_DEEPSEEK_CALL,),
        start=_DEEPSEEK_START,
        end=_DEEPSEEK_END,
        head=re.compile(_DEEPSEEK_HEAD),
        separators=re.compile(rf"(?:{_DEEPSEEK_CALL_END}|```|\s)+"),
        marks=(_DEEPSEEK_CALL, _DEEPSEEK_CALL_END, _DEEPSEEK_SEPARATOR),
    ),
    CallSyntax(format="seed_oss", signs=("<seed:tool_call>",), start="<seed:tool_call>", end="</seed:tool_call>"),
    CallSyntax(format="minimax2", signs=("<minimax:tool_call>",), start="<minimax:tool_call>", end="</minimax:tool_call>"),
    CallSyntax(format="qwen3_5", signs=("<function=",), start="<tool_call>", end="</tool_call>"),
    CallSyntax(
        format="glm4_moe",
        signs=("<arg_key>",),
        start="<tool_call>",
        end="</tool_call>",
        marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    CallSyntax(format="lfm2", signs=("<|tool_call_start|>",), start="<|tool_call_start|>", end="<|tool_call_end|>"),
    CallSyntax(format="gemma4", signs=("<|tool_call>",), start="<|tool_call>", end="<tool_call|>", marks=('<|"|>',)),
    CallSyntax(
        format="mistral",
        signs=("[TOOL_CALLS]",),
        start="[TOOL_CALLS]",
        head=re.compile(f"{_json_head('arguments', '[TOOL_CALLS]')}|{_ARGS_HEAD}"),
        marks=("[ARGS]", "[CALL_ID]"),
    ),
    CallSyntax(
        format="minimax1",
        signs=("<tool_calls>",),
        start="<tool_calls>",
        end="</tool_calls>",
        head=re.compile(_json_head("arguments", "<tool_calls>")),
    ),
    CallSyntax(
        format="qwen",
        signs=("<tool_call>",),
        start="<tool_call>",
        end="</tool_call>",
        head=re.compile(_json_head("arguments", "<tool_call>")),
    ),
    CallSyntax(
        format="llama3",
        signs=(PYTHON_TAG, '"parameters": dictionary of argument name'),
        head=re.compile(_json_head("parameters", PYTHON_TAG)),
        may_be_call=_is_json,
        marks=(PYTHON_TAG,),
    ),
    CallSyntax(
        format="default",
        signs=("Action Input",),
        start="Action:",
        head=re.compile(r"\s*Action:\s*(?P<name>\S[^\n]{0,127}?)\s*Action Input:\s*(?=\{)"),
    ),
    CallSyntax(format="glm4", signs=("请使用 Json 格式表示调用的参数",), may_be_call=_begins_with_a_name),
)
FORCED_CALL = CallSyntax(format="mistral", head=re.compile(_json_head("arguments")), may_be_call=_always)
"""Of an answer that a grammar forces to be one call: {"name": ..., "arguments": {...}}."""


def call_syntax_of(template: str) -> CallSyntax | None:
    """The first syntax that is indicated in the template's source."""
    source = template.replace('\\"', '"')
    return next((one for one in CALL_SYNTAXES if any(sign in source for sign in one.signs)), None)
