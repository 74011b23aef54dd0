"""A conversation -> the text that the model sees, and which of it is trained.

The text is the tokenizer's own chat template, rendered as `apply_chat_template` does. Trained spans are found by rendering
the conversation up to an answer, with the mark that asks for one, and through it: both must begin the whole text. This holds
for any template, marked with {% generation %} or not, and a template that rewrites earlier turns is refused, not mis-trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.errors import ConfigError
from raytune_llm.records import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of each trained answer: its text and its one end token."""


class ChatTemplate:
    """The chat template of a tokenizer. `end_token` is what it writes after an answer. Holds text only, so it can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer_name = tokenizer.name_or_path or "the built-in tokenizer"
        self._plain = tokenizer.get_chat_template()
        self._with_tools = tokenizer.get_chat_template(tools=[{}])
        self._special_tokens = dict(tokenizer.special_tokens_map)
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self.end_token = self._find_end_token()

    def render(self, conversation: Conversation) -> Rendered:
        """Raises BadRow where the template refuses the conversation, RefusedRow where its answers can't be found in the text."""
        messages = [_as_dict(message) for message in conversation.messages]
        tools = list(conversation.tools) or None
        try:
            text = self._render(messages, tools)
            spans = tuple(
                self._span(text, messages, tools, turn) for turn, message in enumerate(conversation.messages) if message.trained
            )
        except TemplateError as error:
            raise BadRow("the chat template refuses the conversation", str(error)) from None
        return Rendered(text, spans)

    def prompt(self, conversation: Conversation) -> str:
        """The text that asks for the next answer."""
        messages = [_as_dict(message) for message in conversation.messages]
        return self._render(messages, list(conversation.tools) or None, add_generation_prompt=True)

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> str:
        source = self._plain if tools is None else self._with_tools
        return _compile_jinja_template(source).render(  # compiled once, it keeps what it compiled
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def _span(self, text: str, messages: list[dict[str, Any]], tools: Any, turn: int) -> tuple[int, int]:
        before = self._render(messages[:turn], tools, add_generation_prompt=True) if turn else ""
        through = self._render(messages[: turn + 1], tools) if turn + 1 < len(messages) else text
        if not text.startswith(before) or not text.startswith(through) or len(through) <= len(before):
            raise RefusedRow(
                f"the chat template of {self.tokenizer_name} does not keep the text before and through turn {turn + 1} "
                "when later turns follow, so the answer can't be found in it",
                "Train only the last answer (`train: false` on earlier ones), or set model.tokenizer to one whose template "
                "leaves earlier turns as they are.",
            )
        return len(before), self._end_of_answer(text, len(before), len(through))

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

    def _find_end_token(self) -> str:
        answer = "answer"
        text = self._render([{"role": "user", "content": "request"}, {"role": "assistant", "content": answer}], None)
        after = self._special.search(text, text.rindex(answer) + len(answer))
        if after is None:
            raise ConfigError(
                "the chat template",
                "must put a special token after an answer, or the model can't learn to stop",
                got=self.tokenizer_name,
                remedy="Set model.tokenizer to one whose template does.",
            )
        return after.group()


def _as_dict(message: Message) -> dict[str, Any]:
    """As chat templates take it. Reasoning goes by the two names that they read."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        plain["tool_calls"] = [{"type": "function", "function": dict(call)} for call in message.tool_calls]
    return plain
