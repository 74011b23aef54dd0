"""Messages of the API -> the token ids that the model is asked with, rendered as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates.render import ChatTemplate
from raytune_llm.records import Conversation, Message
from raytune_llm.serve.answers import AnswerForm
from raytune_llm.serve.api.errors import invalid
from raytune_llm.serve.api.schema import ChatMessage, Tool

KNOWN_TEMPLATE_SETTINGS = {"enable_thinking"}


class Prompts:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._templates: dict[bool | None, ChatTemplate] = {}

    def ids(self, text: str) -> list[int]:
        """Of a plain prompt. Control tokens that are written in it are control tokens, and none is added."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def exact_text(self, ids: Sequence[int]) -> str:
        """With its control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, settings: Mapping[str, Any]
    ) -> tuple[list[int], AnswerForm]:
        """The prompt, and how the answer to it is written."""
        text = self.chat_text(messages, tools, settings)
        return self.ids(text), AnswerForm.of(str(self.tokenizer.get_chat_template()), prompt=text, tools=bool(tools))

    def chat_text(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, settings: Mapping[str, Any], *, ends: bool = False
    ) -> str:
        """As the chat template writes them. ends: they end with an answer, and so does the text."""
        if self.tokenizer.chat_template is None:
            raise invalid("This model has no chat template: use /v1/completions", "messages")
        if unknown := sorted(set(settings) - KNOWN_TEMPLATE_SETTINGS):
            raise invalid(f"chat_template_kwargs has unknown settings: {', '.join(unknown)}", "chat_template_kwargs")
        if ends and messages[-1].role != "assistant":
            raise invalid("The last message must be an answer", "messages")
        template = self._template(settings.get("enable_thinking"))
        conversation = Conversation(
            tuple(_message(message) for message in messages),
            tuple(tool.model_dump(exclude_none=True) for tool in tools or ()),
        )
        try:
            if not ends:
                return template.prompt(conversation)
            rendered = template.render(conversation)
            return rendered.text[: rendered.answers[-1][1]]  # without what the template writes after it, as in training
        except (BadRow, RefusedRow) as error:
            raise invalid(f"The chat template refuses the messages: {error}", "messages") from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "jinja2":
                raise invalid(f"The chat template refuses the messages: {error}", "messages") from None
            raise

    def _template(self, thinking: bool | None) -> ChatTemplate:
        if thinking not in (None, True, False):
            raise invalid("enable_thinking must be true or false", "chat_template_kwargs")
        if thinking not in self._templates:
            self._templates[thinking] = ChatTemplate(self.tokenizer, thinking=thinking)
        return self._templates[thinking]


def _message(message: ChatMessage) -> Message:
    calls = []
    for call in message.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except ValueError:
            raise invalid(f"arguments of the call {call.function.name} must be JSON", "messages") from None
        calls.append({"name": call.function.name, "arguments": arguments})
    return Message(
        "system" if message.role == "developer" else message.role,
        message.text,
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=tuple(calls),
    )
