"""Renders conversations with a named template, which marks its answers itself.

Rendering is most of the work for a short row. So conversations of one shape are filled into one skeleton (skeleton.py), if the
template's rules write their contents unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.templates import kept
from raytune_llm.data.templates.control_tokens import CUT, control_tokens, escape, unescape
from raytune_llm.data.templates.kept import Lost, refusal
from raytune_llm.data.templates.message_layouts import as_objects, is_plain
from raytune_llm.data.templates.named import NamedTemplate, stop_tokens
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
from raytune_llm.records import Conversation, Message, last_answer_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class NamedChat:
    """A named template with a tokenizer that it has been applied to. Its text is tokenized in pieces, cut where LLaMA-Factory
    cuts.

    A cut beside a control token makes no difference. Elsewhere, for example between "[/INST] " and an answer, the answer's first
    token is then the same as in generation, where the prompt is tokenized without the answer.
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
        self.control = control_tokens(special_tokens(tokenizer))
        self._answered = control_tokens({*stop_tokens(tokenizer, template), *end_tokens(tokenizer)} - {*template.thought})
        self._skeletons: dict[tuple[Shape, bool, bool | None], Skeleton] = {}

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        return self._render(conversation, earlier_answers, self._enable_thinking)

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        """If only one side has empty reasoning, it is rendered as part of that answer, not of the common prompt."""
        for thinking in (self._enable_thinking, True):
            first, second = (self._render(side, False, thinking) for side in (chosen, rejected))
            if first.text[: first.answers[-1][0]] == second.text[: second.answers[-1][0]]:
                break
        return first, second  # type: ignore[possibly-undefined]

    def _render(self, conversation: Conversation, earlier_answers: bool, thinking: bool | None) -> Rendered:
        conversation = conversation if earlier_answers else last_answer_only(conversation)
        weights = tuple([loss_weight(message) for message in conversation.messages if message.role == "assistant"])
        if self._writes_as_is(conversation):
            skeleton = self._skeleton(shape_of(conversation), earlier_answers, thinking)
            text, answers, cuts = skeleton.fill([message.content for message in conversation.messages])
            return Rendered(text, in_pairs(answers), weights, tuple(cuts))
        escaped: list[str] = []
        messages = [as_objects(message, self.control, self._answered, escaped) for message in conversation.messages]
        tools = escape(list(conversation.tools), self.control, escaped) or None
        text, spans = self._marked(messages, tools, earlier_answers, thinking)
        if lost := self._what_is_lost(text, messages, tools, conversation.messages, spans, thinking):
            raise refusal(lost, f"data.template={self.template.name}", "qwen")
        unescaped = unescape(text, escaped, spans)
        return Rendered(unescaped.text, in_pairs(unescaped.positions), weights, unescaped.cuts, unescaped.plain)

    def _what_is_lost(
        self,
        text: str,
        messages: list[dict[str, Any]],
        tools: Any,
        chat: Sequence[Message],
        spans: list[int],
        thinking: bool | None,
    ) -> Lost | None:
        """The first part of the row that is missing in the text. Reasoning may be missing where enable_thinking=false removes
        it."""
        numbers = [number for number, message in enumerate(chat) if message.role == "assistant"]
        turns = dict(zip(numbers, in_pairs(spans), strict=True))
        found = kept.lost(text, messages, chat, tools or (), turns, self.template.thought)
        return None if found is not None and found.what == kept.THOUGHT and self.template.reasons and thinking is False else found

    def _writes_as_is(self, conversation: Conversation) -> bool:
        """Whether no control token has to be escaped and the rules in templates/turns.jinja write the contents unchanged.

        The rules search contents for reasoning and remove the newlines after it.
        """
        if not is_plain(conversation):
            return False
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        others = [message.content for message in conversation.messages if message.role != "assistant"]
        if any(map(self.control.is_in, others)) or any(map(self._answered.is_in, answers)):
            return False
        return not (
            self.template.reasons
            and any(
                answer.startswith("\n") or any(word.strip() in answer for word in self.template.thought) for answer in answers
            )
        )

    def _skeleton(self, shape: Shape, earlier_answers: bool, thinking: bool | None) -> Skeleton:
        key = (shape, earlier_answers, thinking)
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_CACHED_SHAPES:
                self._skeletons.clear()
            contents = zip(shape, placeholders(shape), strict=True)
            messages = [{"role": role, "content": content} for (role, _), content in contents]
            self._skeletons[key] = Skeleton.of(*self._marked(messages, None, earlier_answers, thinking))
        return self._skeletons[key]

    def _marked(
        self, messages: list[dict[str, Any]], tools: Any, earlier_answers: bool, thinking: bool | None
    ) -> tuple[str, list[int]]:
        """The rendered text with escaped parts, and the characters at which answers start and end, alternating."""
        template = _compile_jinja_template(self.template.source)
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        try:
            with template_errors(), template.environment.activate_tracker(blocks, spans):  # type: ignore[attr-defined]
                for block in template.generate(
                    messages=messages,
                    tools=tools,
                    add_generation_prompt=False,
                    enable_thinking=thinking,
                    train_history=earlier_answers,
                    **self._variables,
                ):
                    blocks.append(block)  # not extend: the tracker measures the blocks so far
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        return "".join(blocks), [position for span in spans for position in span]
