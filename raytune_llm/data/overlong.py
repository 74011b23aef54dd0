"""data.overlong: shortens, drops or rejects rows with more tokens than data.max_length.

`truncate` keeps the template's own tokens, the tools and the tool calls: it removes whole turns, and if a single turn is still
too long, it cuts the ends of the longest texts; then the row is rendered again. An answer that was cut has no trained end token,
since a model should not learn to stop in the middle of a sentence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from raytune_llm.data.dropped import LEFT_OUT, BadRow, RefusedRow, TooLong
from raytune_llm.data.kinds.answers import NOTHING_LEFT
from raytune_llm.data.kinds.kind import Kind, Targets
from raytune_llm.data.templates.kept import REASONING
from raytune_llm.data.templates.rendered import PlainText, Rendered, Renderer
from raytune_llm.data.tokens.tokenize import BlockTokenizer, Tokens
from raytune_llm.records import Conversation, Labeled, Message, Pair, Record, with_messages

LATER_TURNS, EARLIER_TURNS = "its later turns are left out", "its earlier turns are left out"
CUT_TEXTS, CUT_TOKENS = "its longest texts are cut", "its tokens are cut"
"""How a row was shortened, as counted in the store's statistics."""
MAX_TRIES = 8
"""Attempts at cutting texts. A text alone may have a few more or fewer tokens than within the template."""

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Overlong:
    """A row that is too long, and everything needed to build a shorter one."""

    length: int
    """Its tokens; for a pair, of the longer side."""
    record: Record
    rendered: tuple[Rendered, ...]
    tokens: Sequence[Tokens]
    kind: Kind
    targets: Targets
    renderer: Renderer | PlainText
    tokenize: BlockTokenizer

    def render(self, record: Record) -> tuple[Rendered, ...]:
        """Render a shorter record. Raises BadRow if the template rejects it."""
        try:
            return self.kind.render(record, self.renderer, self.targets)
        except RefusedRow as refused:
            raise BadRow("the row can't be shortened to data.max_length", refused.problem) from None

    def made(self, record: Record) -> Any:
        """The row of a shorter record. Raises TooLong or BadRow."""
        rendered = self.render(record)
        return self.kind.make(record, rendered, self.tokenize(rendered), self.targets)


def drop(row: Overlong) -> tuple[Any, str]:
    raise BadRow(LEFT_OUT, f"{row.length} tokens")


def refuse(row: Overlong) -> tuple[Any, str]:
    raise RefusedRow(
        f"the row has {row.length} tokens, data.max_length is {row.targets.max_length}",
        "Raise data.max_length, or set data.overlong to truncate or drop.",
    )


def cut_tokens(row: Overlong) -> tuple[Any, str]:
    """LLaMA-Factory's rule: keeps the first tokens of prompts and answers, even if that cuts the template's end tokens."""
    return row.kind.make(row.record, row.rendered, row.tokens, row.targets, cut=True), CUT_TOKENS


def shorten(row: Overlong) -> tuple[Any, str]:
    """Remove turns, or if that is not enough, cut texts."""
    if not row.kind.renders_chat:
        return cut_tokens(row)
    record = row.record
    if isinstance(record, Pair) and len(row.rendered) == 1:
        record = record.prompt  # kind of row with prompts only
    for how, candidates in ((LATER_TURNS, _without_later_turns), (EARLIER_TURNS, _without_earlier_turns)):
        shorter = candidates(record, keeps_last=row.kind.keeps_last_answer(row.targets))
        if (made := _first_that_fits(row, shorter)) is not None:
            return made, how
        record = shorter[-1] if shorter else record
    return _with_shorter_texts(row, record), CUT_TEXTS


OVERLONG: dict[str, Callable[[Overlong], tuple[Any, str]]] = {
    "truncate": shorten,
    "llamafactory": cut_tokens,
    "drop": drop,
    "error": refuse,
}
"""data.overlong -> a function that returns the row and how it was shortened, or raises BadRow or RefusedRow."""


def _first_that_fits(row: Overlong, records: list[Record]) -> Any:
    """The row of the first record that is short enough. None: all are too long. Each record is shorter than the one before."""
    low, high, found = 0, len(records), None
    while low < high:
        middle = (low + high) // 2
        try:
            found, high = row.made(records[middle]), middle
        except TooLong:
            low = middle + 1
    return found


def _without_later_turns(record: Record, *, keeps_last: bool) -> list[Record]:
    """The conversation up to each of its trained answers, longest first."""
    if keeps_last or not isinstance(record, Conversation):
        return []
    ends = [number + 1 for number, message in enumerate(record.messages) if message.trained]
    return [replace(record, messages=record.messages[:end]) for end in reversed(ends) if end < len(record.messages)]


def _without_earlier_turns(record: Record, *, keeps_last: bool) -> list[Record]:
    """The conversation from each user message on, longest first. The system message stays."""

    def cut(messages: Messages) -> list[Messages]:
        first = 1 if messages and messages[0].role == "system" else 0
        starts = [
            number
            for number, (before, message) in enumerate(pairwise(messages), start=1)
            if message.role == "user" and before.role != "user" and number > first
        ]
        return [(*messages[:first], *messages[start:]) for start in starts]

    match record:
        case Conversation(messages=messages):
            return [replace(record, messages=kept) for kept in cut(messages)]
        case Labeled(conversation=Conversation(messages=messages)):
            return [replace(record, conversation=replace(record.conversation, messages=kept)) for kept in cut(messages)]
        case Pair(prompt=Conversation(messages=messages)):
            return [replace(record, prompt=replace(record.prompt, messages=kept)) for kept in cut(messages)]
    return []


def _with_shorter_texts(row: Overlong, record: Record) -> Any:
    """Cuts all texts to the same maximum number of tokens, the largest that fits. Reasoning and content count as one text."""
    ends = functools.cache(row.tokenize.ends)
    counts = [[sum(len(ends(text)) for text in _texts(message)) for message in side] for side in _sides(record)]
    budgets = [sum(side) for side in counts]
    beside = row.length - max(len(one.ids) for one in row.tokens)
    shorter = record
    for _ in range(MAX_TRIES):
        rendered = row.render(shorter)
        if shorter is not record:
            rendered = tuple(map(_ending_early, rendered, _sides(shorter), _sides(record)))
        tokens = row.tokenize(rendered)
        try:
            return row.kind.make(shorter, rendered, tokens, row.targets)
        except TooLong:
            excess = [max(0, len(one.ids) + beside - row.targets.max_length) for one in tokens]
            budgets = [budget - over for budget, over in zip(budgets, excess, strict=True)]
            cap = min(map(_cap, counts, budgets))
        if cap < 1:
            break
        shorter = with_messages(record, functools.partial(_capped, cap=cap, ends=ends))
    raise BadRow(NOTHING_LEFT, f"{row.length} tokens, of which {row.length - max(map(sum, counts))} are not in its texts")


def _cap(counts: Sequence[int], budget: int) -> int:
    """The largest cap such that the counts, each cut to the cap, sum to no more than the budget."""
    for place, count in enumerate(sorted(counts)):
        share = budget // (len(counts) - place)
        if count > share:
            return share
        budget -= count
    return max(counts)


def _sides(record: Record) -> list[Messages]:
    match record:
        case Conversation(messages=messages) | Labeled(conversation=Conversation(messages=messages)):
            return [messages]
        case Pair(prompt=Conversation(messages=messages), chosen=chosen, rejected=rejected):
            return [(*messages, *chosen), (*messages, *rejected)]
    raise AssertionError("plain text has no messages")


def _texts(message: Message) -> tuple[str, str]:
    return message.reasoning or "", message.content


def _capped(message: Message, *, cap: int, ends: Callable[[str], list[int]]) -> Message:
    """The message with the first `cap` tokens of its reasoning and content."""
    kept = []
    for text in _texts(message):
        at = ends(text)
        kept.append(text if len(at) <= cap else text[: at[cap - 1]] if cap else "")
        cap = max(0, cap - len(at))
    reasoning = None if message.reasoning is None else kept[0]
    written = message.written and {key: reasoning if key in REASONING else value for key, value in message.written.items()}
    return replace(message, reasoning=reasoning, content=kept[1], written=written)


def _ending_early(rendered: Rendered, shorter: Messages, whole: Messages) -> Rendered:
    """If the last answer was cut, the rendered row with the answer's span ending at the cut."""
    last = shorter[-1]
    if last.role != "assistant" or _texts(last) == _texts(whole[-1]):
        return rendered
    text = (last.content or last.reasoning or "").strip()
    start, end = rendered.answers[-1]
    at = rendered.text.rfind(text, start, end) if text else start
    if at < 0:
        return rendered
    return replace(rendered, answers=(*rendered.answers[:-1], (start, at + len(text))), ends_early=True)
