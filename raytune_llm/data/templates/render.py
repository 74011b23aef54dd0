"""A conversation -> the text that the model sees, and which of it the model says.

The text is the tokenizer's own chat template, rendered as `apply_chat_template` does, or a named one. In the tokenizer's own,
answers are found by rendering the conversation up to an answer, with the mark that asks for one, and through it: both must
begin the whole text. This holds for any template, marked with {% generation %} or not, and a template that rewrites earlier
turns is refused, not mis-trained. A named template marks its answers itself.

Rendering is most of the work of a short row. So conversations of one shape are filled into one form (forms.py): with a
tokenizer's own template, where the form gives the text that the template gives; with a named one, wherever its rules write
contents as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Template, TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates.control_tokens import CUT, ControlTokens, control_tokens, escape, unescape
from raytune_llm.data.templates.forms import Form, Shape, placeholders, shape_of
from raytune_llm.data.templates.named import NamedTemplate
from raytune_llm.data.templates.named import stop_tokens as named_stop_tokens
from raytune_llm.errors import ConfigError
from raytune_llm.records import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


MAX_FORMS = 1000
"""That are remembered; then it starts anew."""


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters [start, end) of each answer: its text and its end. Earlier ones that are not trained may be missing."""
    weights: tuple[float, ...]
    """Of each answer in the loss; 0: it is not trained."""
    cuts: tuple[int, ...] = ()
    """Where the text is cut into pieces that are tokenized each by itself."""
    plain: tuple[tuple[int, int], ...] = ()
    """Characters that are no control tokens, whatever they look like."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Of the trained answers."""
        return tuple(answer for answer, weight in zip(self.answers, self.weights, strict=True) if weight)


class Renderer(Protocol):
    """The chat template of a run."""

    end_of_row: str | None
    """A token that belongs after the last answer though the template does not write it there."""
    control: ControlTokens
    """Control tokens, which are text like any other where somebody typed them."""

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        """Raises BadRow where the template refuses the conversation, RefusedRow where its answers can't be found in the text.

        earlier_answers: they are told as answers to be trained, with their thoughts; else as the model is shown them later.
        """
        ...

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        """Two conversations that differ in their last answer, up to which the texts are the same."""
        ...


class ChatTemplate:
    """The chat template of a tokenizer. `end_token` is what it writes after an answer, if anything. It can be pickled."""

    end_of_row: str | None = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, default_system: str | None = None, thinking: bool | None = None
    ) -> None:
        """`thinking` is passed on as enable_thinking; none leaves it to the template."""
        self.tokenizer_name = tokenizer.name_or_path or "the built-in tokenizer"
        self._plain = tokenizer.get_chat_template()
        self._with_tools = tokenizer.get_chat_template(tools=[{}])
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if thinking is not None:
            self._variables["enable_thinking"] = thinking
        self._default_system = default_system
        specials = _specials(tokenizer)
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self.end_token = self._find_end_token()
        self.control = control_tokens(specials)
        self._answered = control_tokens({self.end_token or "", *_ends(tokenizer)})
        self._forms: dict[tuple[Shape, tuple[float, ...]], tuple[Form, tuple[float, ...]] | None] = {}

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        if self.end_token is None:
            raise ConfigError(
                "the chat template",
                "must put a special token after an answer, or the model can't learn to stop",
                got=self.tokenizer_name,
                fix="Set data.template, or model.tokenizer to one whose template does.",
            )
        escaped: list[str] = []
        told = self._with_system(conversation)
        messages = [_as_dict(message, self.control, self._answered, escaped) for message in told.messages]
        tools = escape(list(told.tools), self.control, escaped) or None
        try:
            text = self._render(messages, tools)
            found = self._from_form(text, messages, told) or self._from_prefixes(text, messages, tools, told)
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        answers = tuple((start, self._end_of_answer(text, start, end)) for start, end in found.turns)
        if not escaped:
            return Rendered(text, answers, found.weights)
        unescaped = unescape(text, escaped, [position for answer in answers for position in answer])
        return Rendered(unescaped.text, _in_twos(unescaped.positions), found.weights, plain=unescaped.plain)

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        sides = (self.render(chosen, earlier_answers=False), self.render(rejected, earlier_answers=False))
        first, second = (side.text[: side.answers[-1][0]] for side in sides)
        if first != second:
            raise RefusedRow(
                f"the chat template of {self.tokenizer_name} writes the request differently before the two answers",
                "Set data.template, or model.tokenizer to one whose template does not.",
            )
        return sides

    def prompt(self, conversation: Conversation) -> str:
        """The text that asks for the next answer."""
        nothing = ControlTokens(re.compile(r"(?!)"), "")
        messages = [_as_dict(message, nothing, nothing, []) for message in self._with_system(conversation).messages]
        return self._render(messages, list(conversation.tools) or None, add_generation_prompt=True)

    def _with_system(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        if self._default_system is None or (messages and messages[0].role == "system"):
            return conversation
        return replace(conversation, messages=(Message("system", self._default_system), *messages))

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> str:
        template, known = _compiled(self._plain if tools is None else self._with_tools)
        # What Template.render does, without merging the environment's globals anew each time.
        variables = {
            **known,
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with _refusals():
            return "".join(template.root_render_func(template.new_context(variables, shared=True)))

    def _from_form(self, text: str, messages: list[dict[str, Any]], told: Conversation) -> _Found | None:
        """None where this text is not what the form of its shape gives, or the shape has none."""
        if not _is_plain(told):
            return None
        shape = (shape_of(told), tuple([_weight(message) for message in told.messages]))
        if shape not in self._forms:
            if len(self._forms) >= MAX_FORMS:
                self._forms.clear()
            self._forms[shape] = self._form(told, placeholders(shape[0]))
        known = self._forms[shape]
        if known is None:
            return None
        form, weights = known
        filled, positions, _ = form.fill([message["content"] for message in messages])
        return _Found(_in_twos(positions), weights) if filled == text else None

    def _form(self, told: Conversation, contents: list[str]) -> tuple[Form, tuple[float, ...]] | None:
        messages = [{"role": message.role, "content": content} for message, content in zip(told.messages, contents, strict=True)]
        try:
            text = self._render(messages, None)
            found = self._from_prefixes(text, messages, None, told)
        except (RefusedRow, TemplateError):
            return None
        return Form.of(text, [position for turn in found.turns for position in turn]), found.weights

    def _from_prefixes(self, text: str, messages: list[dict[str, Any]], tools: Any, told: Conversation) -> _Found:
        turns: list[tuple[int, int]] = []
        weights: list[float] = []
        for number, message in enumerate(told.messages):
            if message.role != "assistant":
                continue
            try:
                turns.append(self._turn(text, messages, tools, number))
                weights.append(_weight(message))
            except (RefusedRow, TemplateError):
                if message.trained:
                    raise
        return _Found(tuple(turns), tuple(weights))

    def _turn(self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int) -> tuple[int, int]:
        before = self._render(messages[:turn], tools, add_generation_prompt=True) if turn else ""
        through = self._render(messages[: turn + 1], tools) if turn + 1 < len(messages) else text
        if not text.startswith(before) or not text.startswith(through) or len(through) <= len(before):
            raise RefusedRow(
                f"the chat template of {self.tokenizer_name} does not keep the text before and through turn {turn + 1} "
                "when later turns follow, so the answer can't be found in it",
                "Train only the last answer (data.mask_history=true), name a template (data.template), or set model.tokenizer "
                "to one whose template leaves earlier turns as they are.",
            )
        return len(before), len(through)

    def _end_of_answer(self, text: str, start: int, end: int) -> int:
        """Past the answer's first end token: what the template writes after it (a newline, say) the model need not learn.

        It is looked for among the special tokens at the very end, with nothing but white space between and after them. Where
        the usual end token is not among them, it is the first, such as the mark that ends a tool call in Llama 3.
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
        text = self._render([{"role": "user", "content": "request"}, {"role": "assistant", "content": answer}], None)
        after = self._special.search(text, text.rindex(answer) + len(answer))
        return None if after is None else after.group()


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template can't do with a value of some type (declarations of tools hold anything) is a refusal like any other."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TemplateError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Found:
    """The answers' turns in a text, where they could be found, and what they weigh in the loss."""

    turns: tuple[tuple[int, int], ...]
    """Characters from the end of what asks for the answer to the end of what the template writes with it."""
    weights: tuple[float, ...]


@lru_cache
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    """The template as `apply_chat_template` compiles it, and the globals of its environment."""
    template = _compile_jinja_template(source)
    return template, dict(template.globals)


class NamedChat:
    """A named template over a tokenizer that has been given it. Its text is cut where LLaMA-Factory's pieces meet.

    Between two turns this makes no difference where a control token stands there; elsewhere ("[/INST] " and an answer, say) an
    answer then starts with a token of its own, as it does when the model is asked for it.
    """

    def __init__(
        self,
        template: NamedTemplate,
        tokenizer: PreTrainedTokenizerFast,
        *,
        enable_thinking: bool | None,
        preserve_thinking: bool,
    ) -> None:
        self.template = template
        self.end_of_row: str | None = str(tokenizer.eos_token) if template.efficient_eos else None
        self._enable_thinking = enable_thinking
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._variables = {name: token for name, token in tokens.items() if token is not None}
        self._variables |= {"preserve_thinking": preserve_thinking, "cut": CUT}
        self._preserve_thinking = preserve_thinking
        self.control = control_tokens(_specials(tokenizer))
        self._answered = control_tokens({*named_stop_tokens(tokenizer, template), *_ends(tokenizer)} - {*template.thought})
        self._forms: dict[tuple[Shape, bool, bool | None], Form] = {}

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        return self._render(conversation, earlier_answers, self._enable_thinking)

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        """An empty thought that only one side has is said by it, not asked for in what is the prompt of both."""
        for thinking in (self._enable_thinking, True):
            first, second = (self._render(side, False, thinking) for side in (chosen, rejected))
            if first.text[: first.answers[-1][0]] == second.text[: second.answers[-1][0]]:
                break
        return first, second  # type: ignore[possibly-undefined]

    def _render(self, conversation: Conversation, earlier_answers: bool, thinking: bool | None) -> Rendered:
        weights = tuple([_weight(message) for message in conversation.messages if message.role == "assistant"])
        if self._writes_as_is(conversation):
            form = self._form(shape_of(conversation), earlier_answers, thinking)
            text, answers, cuts = form.fill([message.content for message in conversation.messages])
            return Rendered(text, _in_twos(answers), weights, tuple(cuts))
        escaped: list[str] = []
        messages = [_as_dict(message, self.control, self._answered, escaped) for message in conversation.messages]
        tools = escape(list(conversation.tools), self.control, escaped) or None
        text, spans = self._marked(messages, tools, earlier_answers, thinking)
        unescaped = unescape(text, escaped, spans)
        return Rendered(unescaped.text, _in_twos(unescaped.positions), weights, unescaped.cuts, unescaped.plain)

    def _writes_as_is(self, conversation: Conversation) -> bool:
        """Whether nothing is to be escaped and the rules in templates/turns.jinja do nothing with the contents but write them.

        They look for thoughts and take the newlines after one away; and what they write of calls and tools is no content.
        """
        if not _is_plain(conversation):
            return False
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        told = [message.content for message in conversation.messages if message.role != "assistant"]
        if any(map(self.control.is_in, told)) or any(map(self._answered.is_in, answers)):
            return False
        return not (
            self.template.reasons
            and any(
                answer.startswith("\n") or any(word.strip() in answer for word in self.template.thought) for answer in answers
            )
        )

    def _form(self, shape: Shape, earlier_answers: bool, thinking: bool | None) -> Form:
        key = (shape, earlier_answers, thinking)
        if key not in self._forms:
            if len(self._forms) >= MAX_FORMS:
                self._forms.clear()
            contents = zip(shape, placeholders(shape), strict=True)
            messages = [{"role": role, "content": content} for (role, _), content in contents]
            self._forms[key] = Form.of(*self._marked(messages, None, earlier_answers, thinking))
        return self._forms[key]

    def _marked(
        self, messages: list[dict[str, Any]], tools: Any, earlier_answers: bool, thinking: bool | None
    ) -> tuple[str, list[int]]:
        """The text with its marks, and where each answer starts and ends."""
        template = _compile_jinja_template(self.template.source)
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        try:
            with _refusals(), template.environment.activate_tracker(blocks, spans):  # type: ignore[attr-defined]
                for block in template.generate(
                    messages=messages,
                    tools=tools,
                    add_generation_prompt=False,
                    enable_thinking=thinking,
                    train_history=earlier_answers,
                    **self._variables,
                ):
                    blocks.append(block)  # not extend: the tracker measures what is there so far
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        return "".join(blocks), [position for span in spans for position in span]


class PlainText:
    """What plain text, which has no turns, needs of a tokenizer."""

    end_of_row: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.control = control_tokens(_specials(tokenizer))


def _is_plain(conversation: Conversation) -> bool:
    """Nothing but contents: no tools, no calls, no thoughts kept apart."""
    return not conversation.tools and not any(
        message.tool_calls or message.reasoning is not None for message in conversation.messages
    )


def _weight(message: Message) -> float:
    return message.weight if message.trained else 0.0


def _in_twos(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(positions[::2], positions[1::2], strict=True))


def _specials(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _ends(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """What an answer must not hold within itself."""
    return {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token is not None}


def _as_dict(message: Message, typed: ControlTokens, answered: ControlTokens, escaped: list[str]) -> dict[str, Any]:
    """As chat templates take it. Reasoning goes by the two names that they read."""
    tokens = answered if message.role == "assistant" else typed
    plain: dict[str, Any] = {"role": message.role, "content": escape(message.content, tokens, escaped)}
    if message.reasoning is not None:
        reasoning = escape(message.reasoning, tokens, escaped)
        plain |= {"reasoning_content": reasoning, "thinking": reasoning}
    if message.tool_calls:
        calls: Sequence[Mapping[str, Any]] = [dict(call) for call in message.tool_calls]
        plain["tool_calls"] = [{"type": "function", "function": call} for call in escape(calls, tokens, escaped)]
    return plain
