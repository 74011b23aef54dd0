"""A conversation -> the text that the model sees, and the spans that the model generates.

The text is the tokenizer's own chat template, rendered as `apply_chat_template` does, or a named one. In the tokenizer's own,
answers are found by rendering the conversation up to an answer, with the generation prompt, and through it: both must be
prefixes of the whole text. This works for any template, with {% generation %} tags or without. A template that rewrites earlier
turns is refused, not mis-trained. A named template tags its answers itself.

A message goes to the tokenizer's own template as the row has it, so that the text is what apply_chat_template makes of it. Where
the template can't read it so (arguments as an object, say, where it joins texts), it is given the usual form instead. A text that
lacks something of its row is refused (kept.py).

Rendering is most of the work of a short row. So conversations of one shape are filled into one form (forms.py): with a
tokenizer's own template, where the form gives the text that the template gives; with a named one, wherever its rules write
contents as they are.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Template, TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates import kept
from raytune_llm.data.templates.control_tokens import CUT, ControlTokens, control_tokens, escape, unescape
from raytune_llm.data.templates.forms import Form, Shape, placeholders, shape_of
from raytune_llm.data.templates.kept import Lost
from raytune_llm.data.templates.named import NamedTemplate, guess
from raytune_llm.data.templates.named import stop_tokens as named_stop_tokens
from raytune_llm.data.templates.tool_calls import name_and_arguments
from raytune_llm.errors import ConfigError
from raytune_llm.records import Conversation, Message, last_answer_only

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
    """Characters that are not control tokens, although they have the same text."""
    ends_early: bool = False
    """The last answer ends where it was cut, before what the template writes after it."""

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
        self._forms: dict[tuple[Shape, tuple[float, ...]], tuple[Form, _Found] | None] = {}
        self._lost: dict[Any, Lost | None] = {}
        self._other_template = suggested(tokenizer)

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        if self.end_token is None:
            raise ConfigError(
                "the chat template",
                "must put a special token after an answer, or the model can't learn to stop",
                got=self.tokenizer_name,
                fix="Set data.template, or model.tokenizer to one whose template does.",
            )
        told = self._with_system(conversation if earlier_answers else last_answer_only(conversation))
        refused: BadRow | RefusedRow | None = None
        for form in _forms_of(told.messages):
            try:
                return self._rendered(told, form)
            except (BadRow, RefusedRow) as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _rendered(self, told: Conversation, form: _MessageForm) -> Rendered:
        escaped: list[str] = []
        messages = [form(message, self.control, self._answered, escaped) for message in told.messages]
        tools = escape(list(told.tools), self.control, escaped) or None
        try:
            text = self._render(messages, tools)
            found = self._from_form(text, messages, told)
            if found is None:
                found = self._from_prefixes(text, messages, tools, told)
                if lost := self._what_is_lost(text, messages, tools, told, found):
                    raise _refusal(lost, self.tokenizer_name, self._other_template)
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        answers = tuple((start, self._end_of_answer(text, start, end)) for start, end in found.turns)
        if not escaped:
            return Rendered(text, answers, found.weights)
        unescaped = unescape(text, escaped, [position for answer in answers for position in answer])
        return Rendered(unescaped.text, _in_twos(unescaped.positions), found.weights, plain=unescaped.plain)

    def _what_is_lost(
        self, text: str, messages: list[dict[str, Any]], tools: Any, told: Conversation, found: _Found
    ) -> Lost | None:
        shape = kept.shape_of(messages, told.messages, tools or ())
        if shape not in self._lost:
            if len(self._lost) >= MAX_FORMS:
                self._lost.clear()
            self._lost[shape] = self._lost_of_shape(messages, tools, told)
        turns = dict(zip(found.numbers, found.turns, strict=True))
        return self._lost[shape] or kept.lost(text, messages, told.messages, tools or (), turns)

    def _lost_of_shape(self, messages: list[dict[str, Any]], tools: Any, told: Conversation) -> Lost | None:
        probes, declared, placed = kept.probe(messages, tools or ())
        try:
            return kept.lost_of_shape(self._render(probes, declared or None), placed, told.messages)
        except TemplateError:
            return None  # it asks for more than placeholders: this row's own values must do

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
        """The text that asks for the next answer. Raises TemplateError."""
        nothing = ControlTokens(re.compile(r"(?!)"), "")
        told = self._with_system(conversation).messages
        refused: TemplateError | None = None
        for form in _forms_of(told):
            messages = [form(message, nothing, nothing, []) for message in told]
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
        form, found = known
        filled, positions, _ = form.fill([message["content"] for message in messages])
        return replace(found, turns=_in_twos(positions)) if filled == text else None

    def _form(self, told: Conversation, contents: list[str]) -> tuple[Form, _Found] | None:
        """None where a content is not in it, or answers can't be found: each row is then looked at for itself."""
        messages = [{"role": message.role, "content": content} for message, content in zip(told.messages, contents, strict=True)]
        try:
            text = self._render(messages, None)
            found = self._from_prefixes(text, messages, None, told)
        except (RefusedRow, TemplateError):
            return None
        form = Form.of(text, [position for turn in found.turns for position in turn])
        return (form, found) if {*form.slots} == {number for number, content in enumerate(contents) if content} else None

    def _from_prefixes(self, text: str, messages: list[dict[str, Any]], tools: Any, told: Conversation) -> _Found:
        turns: list[tuple[int, int]] = []
        weights: list[float] = []
        numbers: list[int] = []
        for number, message in enumerate(told.messages):
            if message.role != "assistant":
                continue
            try:
                turns.append(self._turn(text, messages, tools, number))
                weights.append(_weight(message))
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
        """The prompt is not what the template writes before the last answer."""
        common = next((at for at, (one, other) in enumerate(zip(text, before, strict=False)) if one != other), len(text))
        return RefusedRow(
            f"the chat template of {self.tokenizer_name} asks for an answer with {before[common:]!r}, which it does not write "
            f"before the answer that is there ({text[common : common + 20]!r}...)",
            f"Set data.template={self._other_template}, or model.tokenizer to one whose template writes both alike.",
        )

    def _end_of_answer(self, text: str, start: int, end: int) -> int:
        """Past the answer's first end token: what the template writes after it (a newline, say) the model need not learn.

        It is looked for among the special tokens at the very end, with nothing but white space between and after them. Where
        the usual end token is not among them, it is the first, such as the token that ends a tool call in Llama 3.
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
    numbers: tuple[int, ...]
    """Of the answers' messages."""


@functools.lru_cache
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
        conversation = conversation if earlier_answers else last_answer_only(conversation)
        weights = tuple([_weight(message) for message in conversation.messages if message.role == "assistant"])
        if self._writes_as_is(conversation):
            form = self._form(shape_of(conversation), earlier_answers, thinking)
            text, answers, cuts = form.fill([message.content for message in conversation.messages])
            return Rendered(text, _in_twos(answers), weights, tuple(cuts))
        escaped: list[str] = []
        messages = [_as_objects(message, self.control, self._answered, escaped) for message in conversation.messages]
        tools = escape(list(conversation.tools), self.control, escaped) or None
        text, spans = self._marked(messages, tools, earlier_answers, thinking)
        if lost := self._what_is_lost(text, messages, tools, conversation.messages, spans, thinking):
            raise _refusal(lost, f"data.template={self.template.name}", "qwen")
        unescaped = unescape(text, escaped, spans)
        return Rendered(unescaped.text, _in_twos(unescaped.positions), weights, unescaped.cuts, unescaped.plain)

    def _what_is_lost(
        self,
        text: str,
        messages: list[dict[str, Any]],
        tools: Any,
        told: Sequence[Message],
        spans: list[int],
        thinking: bool | None,
    ) -> Lost | None:
        """All that a named template leaves out it does by its rules, which depend on nothing but this text."""
        numbers = [number for number, message in enumerate(told) if message.role == "assistant"]
        turns = dict(zip(numbers, _in_twos(spans), strict=True))
        found = kept.lost(text, messages, told, tools or (), turns, self.template.thought)
        return None if found is not None and found.what == kept.THOUGHT and self.template.reasons and thinking is False else found

    def _writes_as_is(self, conversation: Conversation) -> bool:
        """Whether nothing is to be escaped and the rules in templates/turns.jinja do nothing with the contents but write them.

        They search for reasoning and remove the newlines after it; their rendering of calls and tools is not content.
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
        """The text with its placeholders, and where each answer starts and ends."""
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
    """Nothing but contents: no tools, no calls, no thoughts kept apart, no other keys."""
    return not conversation.tools and not any(map(_says_more, conversation.messages))


BARE: Mapping[str, Any] = {"role": "", "content": ""}
"""Keys of a message that says nothing else."""


def _weight(message: Message) -> float:
    return message.weight if message.trained else 0.0


def _in_twos(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(positions[::2], positions[1::2], strict=True))


def _specials(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _ends(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """What an answer must not hold within itself."""
    return {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token is not None}


_MessageForm = Callable[[Message, ControlTokens, ControlTokens, list[str]], dict[str, Any]]
"""(message, control tokens in what is told, in answers, where escaped ones go) -> the message as a chat template takes it."""


def _forms_of(messages: Sequence[Message]) -> tuple[_MessageForm, ...]:
    """The forms in which a template is given messages, in turn, until it can read one."""
    if not any(map(_says_more, messages)):
        return USUAL_FORMS[:1]
    written = (_as_written,) if any(message.written for message in messages) else ()
    return (*written, *USUAL_FORMS)


def _says_more(message: Message) -> bool:
    """Than a content."""
    return bool(message.tool_calls) or message.reasoning is not None or (message.written or BARE).keys() != BARE.keys()


def _as_written(message: Message, typed: ControlTokens, answered: ControlTokens, escaped: list[str]) -> dict[str, Any]:
    """As the row has it; the parts of a content are one text."""
    if message.written is None:
        return _as_objects(message, typed, answered, escaped)
    tokens = answered if message.role == "assistant" else typed
    plain = {
        key: message.role if key == "role" else escape(message.content if key == "content" else value, tokens, escaped)
        for key, value in message.written.items()
    }
    if message.reasoning is None:
        return plain
    # transformers' own way to have a thought by the names that templates read
    reasoning = next(plain[key] for key in kept.REASONING if key in plain)
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _usual(
    message: Message,
    typed: ControlTokens,
    answered: ControlTokens,
    escaped: list[str],
    *,
    arguments_as: Callable[[Any], Any],
    nothing_said: str | None,
) -> dict[str, Any]:
    """By the keys that most templates read; a thought goes by both of its names."""
    tokens = answered if message.role == "assistant" else typed
    content = escape(message.content, tokens, escaped)
    plain: dict[str, Any] = {"role": message.role, "content": nothing_said if message.tool_calls and not content else content}
    if message.reasoning is not None:
        reasoning = escape(message.reasoning, tokens, escaped)
        plain |= {"reasoning_content": reasoning, "thinking": reasoning}
    if message.tool_calls:
        plain["tool_calls"] = [_usual_call(call, tokens, escaped, arguments_as) for call in message.tool_calls]
    used = (*plain, *kept.REASONING, "tool_calls", "function_call")
    others = {key: value for key, value in (message.written or {}).items() if key not in used}
    return plain | escape(others, tokens, escaped)


def _json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _as_it_is(arguments: Any) -> Any:
    return arguments


USUAL_FORMS: tuple[_MessageForm, ...] = tuple(
    functools.partial(_usual, arguments_as=arguments_as, nothing_said=nothing_said)
    for nothing_said in ("", None)
    for arguments_as in (_as_it_is, _json)
)
"""Arguments are objects, as most templates want them, or JSON, as those that join texts; beside calls alone the content is empty,
or null (DeepSeek V3's)."""
_as_objects = USUAL_FORMS[0]


def _usual_call(
    call: Mapping[str, Any], tokens: ControlTokens, escaped: list[str], arguments_as: Callable[[Any], Any]
) -> dict[str, Any]:
    name, arguments = name_and_arguments(call)
    function = escape({"name": name, "arguments": arguments}, tokens, escaped)
    function["arguments"] = arguments_as(function["arguments"])
    named = {"id": call["id"]} if "id" in call else {}
    return {"type": "function", **named, "function": function}


def suggested(tokenizer: PreTrainedTokenizerFast) -> str:
    """The name of a template that can say all that a row holds, and brings no token that the tokenizer has not."""
    known = tokenizer.get_vocab()
    if {"<|im_start|>", "<|im_end|>"} <= known.keys():
        return "qwen3" if {"<think>", "</think>"} <= known.keys() else "qwen"
    if "<｜Assistant｜>" in known:
        return "deepseekr1" if {"<think>", "</think>"} <= known.keys() else "deepseek3"
    return guess(tokenizer.name_or_path or "") or ("llama3" if "<|eot_id|>" in known else "mistral")


def _refusal(lost: Lost, template: str, other: str) -> RefusedRow | BadRow:
    """Of a row whose text is not all of it."""
    named = f"the chat template of {template}" if "=" not in template else template
    detail = f" ({lost.detail})" if lost.detail else ""
    choose = f"Set data.template={other}, or model.tokenizer to one whose template writes them."
    match lost.what:
        case kept.TOOLS:
            return RefusedRow(
                f"{named} does not write the row's tools{detail}", f"{choose} data.format.tools=null leaves them out."
            )
        case kept.CALLS:
            return RefusedRow(f"{named} does not write the row's tool calls{detail}", choose)
        case kept.THOUGHT:
            return RefusedRow(
                f"{named} does not write the row's thoughts{detail}", f"Set data.reasoning=drop to leave them out. Or: {choose}"
            )
    return BadRow(f"{named} leaves out a part of a message; set data.template={other}, for example", lost.detail)
