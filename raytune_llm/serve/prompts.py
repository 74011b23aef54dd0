"""Renders messages of the API to prompt token ids, with the same chat template code as training."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.kinds.text import text_start
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.records import Conversation, Message
from raytune_llm.serve.api.errors import invalid
from raytune_llm.serve.api.schema import ChatMessage, Tool
from raytune_llm.serve.output_parser import OutputSyntax
from raytune_llm.serve.token_bytes import TokenBytes

KNOWN_TEMPLATE_SETTINGS = {"enable_thinking"}
SHORT_CHARACTERS = 10_000
"""Texts up to this length are encoded in the event loop, which takes a few milliseconds."""


class Prompts:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {id: token.content for id, token in added.items() if token.special and token.content}
        self._text_start = text_start(tokenizer)
        self.token_bytes = TokenBytes(tokenizer)
        self._templates: dict[bool | None, ChatTemplate] = {}

    async def plain_ids(self, text: str) -> list[int]:
        """Token ids of a plain text as it is trained: after the token that begins texts, if the tokenizer has one."""
        ids = await self.ids(text)
        return ids if self._text_start is None or ids[:1] == [self._text_start] else [self._text_start, *ids]

    async def ids(self, text: str) -> list[int]:
        """Token ids of a text. Control tokens in the text are encoded as control tokens; no special token is added. Raises
        APIError (400) for a text that is no Unicode."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise invalid(
                    f"A text must be Unicode, but it holds half of a surrogate pair ({error.object[error.start]!r})"
                ) from None
        return self._encoded(text) if len(text) <= SHORT_CHARACTERS else await asyncio.to_thread(self._encoded, text)

    def _encoded(self, text: str) -> list[int]:
        # Of a batch: `encode` holds Python's lock for seconds, in which no token of other answers comes.
        return self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def exact_text(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def special_ids(self, words: Sequence[str]) -> list[int]:
        """The special tokens that these words hold."""
        return [id for id, text in self._special.items() if any(text in word for word in words)]

    async def chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, settings: Mapping[str, Any]
    ) -> tuple[list[int], OutputSyntax]:
        """The prompt's token ids, and the syntax of the answer for parsing it."""
        text = self.chat_text(messages, tools, settings)
        return await self.ids(text), OutputSyntax.of(str(self.tokenizer.get_chat_template()), prompt=text, tools=bool(tools))

    def chat_text(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None, settings: Mapping[str, Any], *, ends: bool = False
    ) -> str:
        """The rendered messages, followed by the generation prompt.

        ends: the last message is an answer, and the text ends with it instead. Raises APIError (400) for messages that the
        template rejects.
        """
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
            return rendered.text[
                : rendered.answers[-1][1]
            ]  # without the text that the template adds after the answer, as in training
        except (BadRow, RefusedRow) as error:
            raise invalid(f"The chat template rejects the messages: {error}", "messages") from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "jinja2":
                raise invalid(f"The chat template rejects the messages: {error}", "messages") from None
            raise

    @cached_property
    def thinking_can_be_set(self) -> bool:
        """enable_thinking changes prompts of this chat template."""
        asked = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="c"), Message("user", "d")))
        return self._changes((thinking, asked) for thinking in (None, True, False))

    @cached_property
    def tools_are_told(self) -> bool:
        """Prompts of this chat template hold the tools."""
        function = {"name": "a", "description": "b", "parameters": {"type": "object", "properties": {}}}
        tools = ({"type": "function", "function": function},)
        return self._changes((None, Conversation((Message("user", "a"),), given)) for given in ((), tools))

    def _changes(self, asked: Iterable[tuple[bool | None, Conversation]]) -> bool:
        """Prompts, each by enable_thinking and its conversation, differ."""
        if self.tokenizer.chat_template is None:
            return True
        try:
            return len({self._template(thinking).prompt(conversation) for thinking, conversation in asked}) > 1
        except jinja2.TemplateError:  # it has rules of its own for conversations
            return True

    def _template(self, thinking: bool | None) -> ChatTemplate:
        if thinking not in (None, True, False):
            raise invalid("enable_thinking must be true or false", "chat_template_kwargs")
        if thinking not in self._templates:
            self._templates[thinking] = ChatTemplate(self.tokenizer, thinking=thinking)
        return self._templates[thinking]


def _message(message: ChatMessage) -> Message:
    """The message for the chat template. It keeps all its keys, as in training, since some templates read names and ids."""
    calls = []
    for call in message.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            raise invalid(f"arguments of the call {call.function.name} must be JSON", "messages") from None
        calls.append({"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}})
    role = "system" if message.role == "developer" else message.role
    written: dict[str, Any] = {"role": role, "content": message.text}
    written |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    reasoning = message.reasoning_content or message.reasoning
    written |= {} if reasoning is None else {"reasoning_content": reasoning}
    written |= {"tool_calls": calls} if calls else {}
    return Message(role, message.text, reasoning=reasoning, tool_calls=tuple(calls), written=written)
