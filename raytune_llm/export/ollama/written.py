"""What a chat template writes around each part of a conversation, read from what it renders, as Ollama's template.

A conversation of marks is rendered: the text between two marks is what the chat template writes there. Whether the parts give all
that it renders is for modelfile.py to check: a chat template may depend on more than is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from raytune_llm.export.ollama.go_template import (
    Begin,
    Each,
    Keep,
    Mark,
    Node,
    Test,
    Value,
    When,
    both,
    equal,
    given,
    negated,
    nodes,
)
from raytune_llm.export.ollama.prompts import Call, ChatTemplate, Message, Prompt, Unsaid, answer, result, system, tool, user

SYSTEM, ASKED, ANSWERED, AGAIN = "a-system-text", "a-question", "an-answer", "another-question"
THOUGHT, REMARK, RESULT, OTHER_RESULT = "a-thought", "a-remark", "a-result", "another-result"
TOOLS = (tool("a_tool", "its-purpose"), tool("b_tool", "its-use"))
CALLS: Sequence[Call] = (("a_tool", {"an_argument": "a-value"}), ("b_tool", {"an_argument": "another-value"}))

GIVEN_TOOLS, CALLED = given("$.Tools"), given(".ToolCalls")
ONE_CALL = Test("eq (len .ToolCalls) 1", lambda scope: len(scope.value(".ToolCalls")) == 1)
AFTER_TOOL, IS_TOOL = equal("$before", "tool"), equal(".Role", "tool")
EVER = Test("true", lambda scope: True)
SINCE_QUESTION = Test("gt $i $asked", lambda scope: scope.variables["$i"] > scope.variables["$asked"])
LAST = Test("eq (len (slice $.Messages $i)) 1", lambda scope: scope.variables["$i"] == len(scope.root["Messages"]) - 1)


@dataclass(frozen=True)
class Head:
    """The text before the first question, including the beginning of its turn."""

    with_system: Sequence[Node | str]
    without: Sequence[Node | str]
    """The last of each is a str."""

    def ends_in(self, text: str) -> bool:
        return all(str(parts[-1]).endswith(text) for parts in (self.with_system, self.without))

    def node(self, *, less: str = "") -> Node:
        """less: a text to leave out at the end."""
        texts = [nodes(*parts[:-1], str(parts[-1]).removesuffix(less)) for parts in (self.with_system, self.without)]
        return When(given("$.System"), *texts)


@dataclass(frozen=True)
class Calls:
    """The texts around the calls of an answer."""

    start: str
    """What its turn starts with in every case."""
    alone: str
    """From there to the first name, in an answer without text."""
    before_text: str
    after_text: str
    """From the text of an answer that has one to the first name."""
    to_arguments: str
    """From a name to its arguments."""
    to_next: str
    """From arguments to the next name."""
    end: str
    """After the last arguments."""

    def node(self) -> Node:
        texts = When(negated(given(".Content")), Mark(self.alone), nodes(self.before_text, Value(".Content"), self.after_text))
        call = nodes(Value(".Function.Name"), self.to_arguments, Value(".Function.Arguments"))
        each = Each(".ToolCalls", nodes(When(given("$call"), nodes(self.to_next)), call), "$call")
        return nodes(texts, each, self.end)


@dataclass(frozen=True)
class Tools:
    head: Head
    one: Calls
    several: Calls | None
    """None: an answer has one call."""
    result: tuple[str, str]
    to_next_result: str


@dataclass(frozen=True)
class Thinking:
    around: tuple[str, str]
    kept: Test
    """Which answers have theirs in a prompt."""
    starts: Mapping[bool | None, str]
    """What an answer starts with where thinking is asked for, is not wanted, or is left open."""


@dataclass(frozen=True)
class Written:
    head: Head
    question: tuple[str, str]
    answer: tuple[str, str]
    start: str
    """The generation prompt."""
    tools: Tools | None = None
    thinking: Thinking | None = None

    def template(self) -> Node:
        heads = [self.head, *([self.tools.head] if self.tools else [])]
        apart = all(head.ends_in(self.question[0]) for head in heads)
        head = self._with_tools(*[head.node(less=self.question[0] if apart else "") for head in heads])
        parts: list[Node | str] = []
        if self.thinking is not None and self.thinking.kept is SINCE_QUESTION:
            parts += [Begin("$asked", 0), Each(".Messages", When(equal(".Role", "user"), Keep("$asked", "$i")), "$i")]
        parts += [Begin("$before", "")] if self.tools else []
        parts += [head] if apart else [Begin("$begun", "")]
        begin: Node = nodes(self.question[0])
        if not apart:
            begin = When(given("$begun"), begin, nodes(head, Keep("$begun", ".Role")))
        question = nodes(begin, Value(".Content"), self.question[1])
        parts += [Each(".Messages", self._turn(question), "$i"), self._end_of_results(AFTER_TOOL), self._start()]
        return nodes(*parts)

    def _with_tools(self, plain: Node, tools: Node | None = None) -> Node:
        return plain if tools is None else When(GIVEN_TOOLS, tools, plain)

    def _turn(self, question: Node) -> Node:
        answers = When(equal(".Role", "assistant"), self._answer())
        if self.tools is None:
            return When(equal(".Role", "user"), question, answers)
        turns = When(equal(".Role", "user"), question, replace(answers, other=When(IS_TOOL, self._result(self.tools))))
        return nodes(self._end_of_results(both(AFTER_TOOL, negated(IS_TOOL))), turns, Keep("$before", ".Role"))

    def _answer(self) -> Node:
        start, end = self.answer
        if self.tools is None:
            return nodes(start, self._thought(), Value(".Content"), end)
        start = self.tools.one.start
        plain = nodes(self.answer[0].removeprefix(start), Value(".Content"), end)
        calls = When(ONE_CALL, self.tools.one.node(), (self.tools.several or self.tools.one).node())
        # Ollama takes the first text in the first `if .ToolCalls` for what calls begin with.
        return nodes(start, self._thought(), When(CALLED, calls, plain))

    def _thought(self) -> Node:
        if self.thinking is None:
            return nodes()
        before, after = (Mark(text) for text in self.thinking.around)
        return When(both(given(".Thinking"), self.thinking.kept), nodes(before, Value(".Thinking"), after))

    def _result(self, tools: Tools) -> Node:
        return nodes(When(AFTER_TOOL, nodes(tools.to_next_result), nodes(tools.result[0])), Value(".Content"))

    def _end_of_results(self, test: Test) -> Node:
        """Results in a row may share a turn: it ends where something else follows."""
        return nodes() if self.tools is None else When(test, nodes(self.tools.result[1]))

    def _start(self) -> Node:
        if self.thinking is None:
            return nodes(self.start)
        asked, unwanted, left_open = (nodes(self.thinking.starts[mode]) for mode in (True, False, None))
        return When(given("$.IsThinkSet"), When(given("$.Think"), asked, unwanted), left_open)


def written(template: ChatTemplate) -> Written:
    """The parts that a conversation without tools and thoughts is made of. Raises Unsaid if one is not in its place."""
    ask, asked = template.text(Prompt([user(ASKED)])), template.text(Prompt([user(ASKED)]), asks=False)
    answered = [user(ASKED), answer(ANSWERED)]
    after_question = _cut(asked, ASKED)[-1]
    after_answer = _cut(template.text(Prompt(answered), asks=False), ANSWERED)[-1]
    again = template.text(Prompt([*answered, user(AGAIN)]))
    _, before_answer, before_question, _ = _cut(again, ASKED, ANSWERED, AGAIN)
    before_system, after_system, _ = _cut(template.text(Prompt([system(SYSTEM), user(ASKED)])), SYSTEM, ASKED)
    return Written(
        Head([before_system, Value("$.System"), after_system], [_cut(ask, ASKED)[0]]),
        (_without(before_question, start=after_answer), after_question),
        (_without(before_answer, start=after_question), after_answer),
        _without(_cut(ask, ASKED)[-1], start=after_question),
    )


def tools_of(template: ChatTemplate, known: Written) -> Tools:
    """Raises Unsaid where the chat template has none, or writes them in another way than as JSON with names before arguments."""
    with_system = template.text(Prompt([system(SYSTEM), user(ASKED)], TOOLS))
    without = template.text(Prompt([user(ASKED)], TOOLS))
    if without == template.text(Prompt([user(ASKED)])):
        raise Unsaid("it does not write tools")
    before_system, after_system, _ = _cut(with_system, SYSTEM, ASKED)
    head = Head(
        [*_declared(before_system), Value("$.System"), *_declared(after_system)],
        _declared(_cut(without, ASKED)[0]),
    )
    if not any(isinstance(part, Each) for part in head.without):
        raise Unsaid("it does not write tools as JSON before the first question")
    one, to_result = _calls(template, known, CALLS[:1])
    several, calls = None, CALLS[:1]
    with suppress(Unsaid):  # it may have one call an answer
        (several, _), calls = _calls(template, known, CALLS), CALLS
        one = replace(one, to_next=several.to_next)
    called = answer("", calls=calls)
    results = template.text(Prompt([user(ASKED), called, result(RESULT), result(OTHER_RESULT)], TOOLS))
    _, to_next, after = _cut(results, RESULT, OTHER_RESULT)
    return Tools(head, one, several, (to_result, _without(after, end=known.start)), to_next)


def thinking_of(template: ChatTemplate, known: Written) -> Thinking:
    """Raises Unsaid where the chat template writes no thoughts, or without a text before and after them."""
    thought = template.text(Prompt([user(ASKED), answer(ANSWERED, thought=THOUGHT)]), asks=False)
    if THOUGHT not in thought:
        raise Unsaid("it does not write thoughts")
    _, before, after, _ = _cut(thought, ASKED, THOUGHT, ANSWERED)
    before = _without(before, start=known.question[1] + known.answer[0])
    if not (before.strip() and after.strip()):
        raise Unsaid("it has no text before or after a thought, by which Ollama would find it")
    earlier = THOUGHT in template.text(Prompt([user(ASKED), answer(ANSWERED, thought=THOUGHT), user(AGAIN)]))
    kept = EVER if earlier else LAST
    if known.tools is not None:
        called = [user(ASKED), answer("", thought=THOUGHT, calls=CALLS[:1]), result(RESULT)]
        since = THOUGHT in template.text(Prompt(called, TOOLS))
        kept = SINCE_QUESTION if since and not earlier else kept
    starts = {mode: _cut(template.text(Prompt([user(ASKED)], thinking=mode)), ASKED)[-1] for mode in (True, False, None)}
    return Thinking((before, after), kept, {mode: _without(start, start=known.question[1]) for mode, start in starts.items()})


def _calls(template: ChatTemplate, known: Written, calls: Sequence[Call]) -> tuple[Calls, str]:
    """(the texts around these calls, the text from the end of the answer to a result)."""

    def around(remark: str, *results: Message) -> tuple[str, list[str]]:
        """(the text before the first call, the texts between and after calls)."""
        _, text = _cut(template.text(Prompt([user(ASKED), answer(remark, calls=calls), *results], TOOLS), asks=False), ASKED)
        pieces = []
        for name, arguments in calls:
            before, text = _cut(text, name)
            to_arguments, text = _until(text, arguments)
            pieces += [before, to_arguments]
        return _without(pieces[0], start=known.question[1]), [*pieces[1:], text]

    alone, (*pieces, rest) = around("", result(RESULT))
    beside, (*others, _) = around(REMARK, result(RESULT))
    before_text, after_text = _cut(beside, REMARK)
    end = around("")[1][-1]
    if others != pieces:
        raise Unsaid("it writes calls beside a text in another way than alone")
    shared = _shared(known.answer[0], alone, before_text)
    alone, before_text = alone.removeprefix(shared), before_text.removeprefix(shared)
    if not Mark(alone).can_be_said:
        raise Unsaid("it has no text before a call, by which Ollama would find it")
    to_next = pieces[1] if len(calls) > 1 else ""
    return Calls(shared, alone, before_text, after_text, pieces[0], to_next, end), _without(_cut(rest, RESULT)[0], start=end)


def _declared(text: str) -> list[Node | str]:
    """The text with a loop over Ollama's tools in place of TOOLS. The last item is a str."""
    pieces: list[str] = []
    whole = False
    for declared in TOOLS:
        for known in (declared, declared["function"]):
            try:
                before, text = _until(text, known)
            except Unsaid:
                continue
            pieces, whole = [*pieces, before], known is declared
            break
    if len(pieces) != len(TOOLS):
        return ["".join([*pieces, text])]
    function = Value(".Function")
    declaration = nodes('{"type": "function", "function": ', function, "}") if whole else function
    return [pieces[0], Each("$.Tools", nodes(When(given("$tool"), nodes(pieces[1])), declaration), "$tool"), text]


def _until(text: str, value: Mapping[str, Any]) -> tuple[str, str]:
    """The texts before and after the value, which is written as JSON with any spaces. Raises Unsaid if it is not there."""
    at = text.find("{")
    while at >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            found, end = None, at
        if found == value:
            return text[:at], text[end:]
        at = text.find("{", at + 1)
    raise Unsaid(f"it does not write {json.dumps(value)} as JSON")


def _cut(text: str, *marks: str) -> list[str]:
    """The texts before, between and after the marks. Raises Unsaid if one is missing."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise Unsaid(f"{mark} is not rendered")
        pieces.append(before)
    return [*pieces, text]


def _shared(*texts: str) -> str:
    """The longest common beginning of the texts."""
    same = takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in same)


def _without(text: str, *, start: str = "", end: str = "") -> str:
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise Unsaid(f"{start + end!r} is not in {text!r}: it has parts of turns that depend on others")
    return text[len(start) : len(text) - len(end)]
