"""Renders conversations with a tokenizer's own chat template, and finds the answers in the text.

The text is what `apply_chat_template` gives. An answer is found by rendering the conversation up to the answer, with the
generation prompt, and through the answer: both must be prefixes of the full text. This works for any template, with {%
generation %} tags or without. A template that rewrites earlier turns is rejected.

A template gets messages in the row's own layout. If it can't read that, for example arguments as an object where it concatenates
texts, it gets other layouts (message_layouts.py). A text that lacks a part of its row is rejected (kept.py).

Rendering is most of the work for a short row. So conversations of one shape are filled into one skeleton (skeleton.py), if the
skeleton gives the same text as the template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates import kept
from raytune_llm.data.templates.control_tokens import ControlTokens, control_tokens, escape, unescape
from raytune_llm.data.templates.kept import Lost, refusal
from raytune_llm.data.templates.message_layouts import MessageLayout, is_plain, layouts_of
from raytune_llm.data.templates.named import guess
from raytune_llm.data.templates.rendered import (
    MAX_CACHED_SHAPES,
    Rendered,
    end_tokens,
    in_pairs,
    loss_weight,
    special_tokens,
    template_errors,
)
from raytune_llm.data.templates.skeleton import Shape, Skeleton, placeholders, shape_of
from raytune_llm.errors import ConfigError, first_line
from raytune_llm.records import Conversation, Message, last_answer_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatTemplate:
    """The chat template of a tokenizer. Can be pickled. end_token: the special token that it writes after an answer, if any."""

    end_of_row: str | None = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, default_system: str | None = None, thinking: bool | None = None
    ) -> None:
        """default_system: the system message of conversations without one. thinking: passed to the template as enable_thinking;
        None: not passed, so that the template's default applies."""
        self.tokenizer_name = tokenizer.name_or_path or "the built-in tokenizer"
        self._plain = tokenizer.get_chat_template()
        self._with_tools = tokenizer.get_chat_template(tools=[{}])
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if thinking is not None:
            self._variables["enable_thinking"] = thinking
        self._default_system = default_system
        specials = special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._other_template = suggested(tokenizer)
        self.end_token = self._find_end_token()
        self.control = control_tokens(specials)
        self._answered = control_tokens({self.end_token or "", *end_tokens(tokenizer)})
        self._skeletons: dict[tuple[Shape, tuple[float, ...]], tuple[Skeleton, _Found] | None] = {}
        self._lost: dict[Any, Lost | None] = {}

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        if self.end_token is None:
            raise ConfigError(
                "the chat template",
                "must put a special token after an answer, or the model can't learn to stop",
                got=self.tokenizer_name,
                fix="Set data.template, or model.tokenizer to one whose template does.",
            )
        chat = self._with_system(conversation if earlier_answers else last_answer_only(conversation))
        refused: BadRow | RefusedRow | None = None
        for layout in layouts_of(chat.messages):
            try:
                return self._rendered(chat, layout)
            except (BadRow, RefusedRow) as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _rendered(self, chat: Conversation, layout: MessageLayout) -> Rendered:
        escaped: list[str] = []
        messages = [layout(message, self.control, self._answered, escaped) for message in chat.messages]
        tools = escape(list(chat.tools), self.control, escaped) or None
        try:
            text = self._render(messages, tools)
            found = self._from_skeleton(text, messages, chat)
            if found is None:
                found = self._from_prefixes(text, messages, tools, chat)
                if lost := self._what_is_lost(text, messages, tools, chat, found):
                    raise refusal(lost, self.tokenizer_name, self._other_template)
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        answers = tuple((start, self._end_of_answer(text, start, end)) for start, end in found.turns)
        if not escaped:
            return Rendered(text, answers, found.weights)
        unescaped = unescape(text, escaped, [position for answer in answers for position in answer])
        return Rendered(unescaped.text, in_pairs(unescaped.positions), found.weights, plain=unescaped.plain)

    def _what_is_lost(
        self, text: str, messages: list[dict[str, Any]], tools: Any, chat: Conversation, found: _Found
    ) -> Lost | None:
        shape = kept.shape_of(messages, chat.messages, tools or ())
        if shape not in self._lost:
            if len(self._lost) >= MAX_CACHED_SHAPES:
                self._lost.clear()
            self._lost[shape] = self._lost_of_shape(messages, tools, chat)
        turns = dict(zip(found.numbers, found.turns, strict=True))
        return self._lost[shape] or kept.lost(text, messages, chat.messages, tools or (), turns)

    def _lost_of_shape(self, messages: list[dict[str, Any]], tools: Any, chat: Conversation) -> Lost | None:
        probes, declared, placed = kept.probe(messages, tools or ())
        try:
            return kept.lost_of_shape(self._render(probes, declared or None), placed, chat.messages)
        except TemplateError:
            return None  # the template needs more than placeholders: only this row's own values can be checked

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        sides = (self.render(chosen, earlier_answers=False), self.render(rejected, earlier_answers=False))
        first, second = (side.text[: side.answers[-1][0]] for side in sides)
        if first != second:
            raise RefusedRow(
                f"the chat template of {self.tokenizer_name} writes the prompt differently before the two answers",
                "Set data.template, or model.tokenizer to one whose template does not.",
            )
        return sides

    def prompt(self, conversation: Conversation) -> str:
        """The text of the conversation with the generation prompt. Raises TemplateError."""
        nothing = ControlTokens(re.compile(r"(?!)"), "")
        chat = self._with_system(conversation).messages
        refused: TemplateError | None = None
        for layout in layouts_of(chat):
            messages = [layout(message, nothing, nothing, []) for message in chat]
            try:
                return self._render(messages, list(conversation.tools) or None, add_generation_prompt=True)
            except TemplateError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _with_system(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        if self._default_system is None or (messages and messages[0].role == "system"):
            return conversation
        return replace(conversation, messages=(Message("system", self._default_system), *messages))

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> str:
        template, known = _compiled(self._plain if tools is None else self._with_tools)
        # Like Template.render, without merging the environment's globals each time.
        variables = {
            **known,
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with template_errors():
            return "".join(template.root_render_func(template.new_context(variables, shared=True)))

    def _from_skeleton(self, text: str, messages: list[dict[str, Any]], chat: Conversation) -> _Found | None:
        """The answers in the text by its shape's skeleton. None: there is no skeleton, or it gives another text."""
        if not is_plain(chat):
            return None
        shape = (shape_of(chat), tuple([loss_weight(message) for message in chat.messages]))
        if shape not in self._skeletons:
            if len(self._skeletons) >= MAX_CACHED_SHAPES:
                self._skeletons.clear()
            self._skeletons[shape] = self._skeleton(chat, placeholders(shape[0]))
        known = self._skeletons[shape]
        if known is None:
            return None
        skeleton, found = known
        filled, positions, _ = skeleton.fill([message["content"] for message in messages])
        return replace(found, turns=in_pairs(positions)) if filled == text else None

    def _skeleton(self, chat: Conversation, contents: list[str]) -> tuple[Skeleton, _Found] | None:
        """The skeleton of the conversation's shape. None: a content is missing in it, or answers can't be found; then every row
        is rendered and searched."""
        messages = [{"role": message.role, "content": content} for message, content in zip(chat.messages, contents, strict=True)]
        try:
            text = self._render(messages, None)
            found = self._from_prefixes(text, messages, None, chat)
        except (RefusedRow, TemplateError):
            return None
        skeleton = Skeleton.of(text, [position for turn in found.turns for position in turn])
        return (skeleton, found) if {*skeleton.slots} == {number for number, content in enumerate(contents) if content} else None

    def _from_prefixes(self, text: str, messages: list[dict[str, Any]], tools: Any, chat: Conversation) -> _Found:
        turns: list[tuple[int, int]] = []
        weights: list[float] = []
        numbers: list[int] = []
        for number, message in enumerate(chat.messages):
            if message.role != "assistant":
                continue
            try:
                turns.append(self._turn(text, messages, tools, number))
                weights.append(loss_weight(message))
                numbers.append(number)
            except (RefusedRow, TemplateError):
                if message.trained:
                    raise
        return _Found(tuple(turns), tuple(weights), tuple(numbers))

    def _turn(self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int) -> tuple[int, int]:
        before = self._render(messages[:turn], tools, add_generation_prompt=True) if turn else ""
        through = self._render(messages[: turn + 1], tools) if turn + 1 < len(messages) else text
        if not text.startswith(before) and text.startswith(self._render(messages[:turn], tools)):
            raise self._asked_otherwise(text, before)
        if not text.startswith(before) or not text.startswith(through) or len(through) <= len(before):
            raise RefusedRow(
                f"the chat template of {self.tokenizer_name} does not keep the text before and through turn {turn + 1} "
                "when later turns follow, so the answer can't be found in it",
                "Train only the last answer (data.mask_history=true), name a template (data.template), or set model.tokenizer "
                "to one whose template leaves earlier turns as they are.",
            )
        return len(before), len(through)

    def _asked_otherwise(self, text: str, before: str) -> RefusedRow:
        """The error for a generation prompt that differs from the text before the answer."""
        common = next((at for at, (one, other) in enumerate(zip(text, before, strict=False)) if one != other), len(text))
        return RefusedRow(
            f"the chat template of {self.tokenizer_name} asks for an answer with {before[common:]!r}, which it does not write "
            f"before the answer that is there ({text[common : common + 20]!r}...)",
            f"Set data.template={self._other_template}, or model.tokenizer to one whose template writes both alike.",
        )

    def _end_of_answer(self, text: str, start: int, end: int) -> int:
        """The character after the answer's end token. Text that the template writes after it, such as a newline, is not trained.

        The end token is searched among the special tokens at the end of the turn, with only white space between and after them.
        If the template's usual one is not there, it is the first of them, such as the token that ends a tool call in Llama 3.
        """
        run: list[re.Match[str]] = []
        edge = end
        for special in reversed(list(self._special.finditer(text, start, end))):
            if text[special.end() : edge].strip():
                break
            run.insert(0, special)
            edge = special.start()
        if not run:
            return end
        return next((special for special in run if special.group() == self.end_token), run[0]).end()

    def _find_end_token(self) -> str | None:
        answer = "answer"
        try:
            text = self._render([{"role": "user", "content": "request"}, {"role": "assistant", "content": answer}], None)
        except TemplateError as error:
            raise ConfigError(
                "the chat template",
                f"must write a question and its answer ({first_line(error)})",
                got=self.tokenizer_name,
                fix=f"Correct it, or set data.template={self._other_template}.",
            ) from None
        after = None if answer not in text else self._special.search(text, text.rindex(answer) + len(answer))
        return None if after is None else after.group()


def answer_end(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The special token that the tokenizer's chat template writes after an answer. None: it has no template, or one that writes
    no such token, or that can't render an answer."""
    if tokenizer.chat_template is None:
        return None
    try:
        return ChatTemplate(tokenizer).end_token
    except ConfigError:
        return None


@dataclass(frozen=True, slots=True)
class _Found:
    """The answers that were found in a text, with their loss weights."""

    turns: tuple[tuple[int, int], ...]
    """Characters [start, end) from the end of the generation prompt to the end of the turn."""
    weights: tuple[float, ...]
    numbers: tuple[int, ...]
    """The index of each answer's message in the conversation."""


@functools.lru_cache
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    """The template, compiled as in `apply_chat_template`, and the globals of its environment."""
    template = _compile_jinja_template(source)
    return template, dict(template.globals)


def suggested(tokenizer: PreTrainedTokenizerFast) -> str:
    """The name of a template that can render all parts of a row and needs no tokens that the tokenizer lacks."""
    known = tokenizer.get_vocab()
    if {"<|im_start|>", "<|im_end|>"} <= known.keys():
        return "qwen3" if {"<think>", "</think>"} <= known.keys() else "qwen"
    if "<｜Assistant｜>" in known:
        return "deepseekr1" if {"<think>", "</think>"} <= known.keys() else "deepseek3"
    return guess(tokenizer.name_or_path or "") or ("llama3" if "<|eot_id|>" in known else "mistral")
