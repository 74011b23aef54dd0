"""The layouts of messages that chat templates read: as the row has them, or with the keys that most templates read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raytune_llm.data.templates import kept
from raytune_llm.data.templates.control_tokens import ControlTokens, escape
from raytune_llm.data.templates.tool_calls import name_and_arguments
from raytune_llm.records import Conversation, Message

MessageLayout = Callable[[Message, ControlTokens, ControlTokens, list[str]], dict[str, Any]]
"""(message, control tokens to escape in contents, in answers, list that collects escaped texts) -> a chat template's message."""

CONTENT_ONLY: Mapping[str, Any] = {"role": "", "content": ""}
"""The keys of a message with a content only."""


def layouts_of(messages: Sequence[Message]) -> tuple[MessageLayout, ...]:
    """The layouts to try in turn, until the template can render one."""
    if not any(map(_has_more_than_content, messages)):
        return COMMON_LAYOUTS[:1]
    written = (_as_written,) if any(message.written for message in messages) else ()
    return (*written, *COMMON_LAYOUTS)


def is_plain(conversation: Conversation) -> bool:
    """Whether messages have contents only: no tools, no tool calls, no separate reasoning, no other keys."""
    return not conversation.tools and not any(map(_has_more_than_content, conversation.messages))


def _has_more_than_content(message: Message) -> bool:
    return (
        bool(message.tool_calls)
        or message.reasoning is not None
        or (message.written or CONTENT_ONLY).keys() != CONTENT_ONLY.keys()
    )


def _as_written(message: Message, typed: ControlTokens, answered: ControlTokens, escaped: list[str]) -> dict[str, Any]:
    """The row's own keys; a content in parts is joined to one text."""
    if message.written is None:
        return as_objects(message, typed, answered, escaped)
    tokens = answered if message.role == "assistant" else typed
    plain = {
        key: message.role if key == "role" else escape(message.content if key == "content" else value, tokens, escaped)
        for key, value in message.written.items()
    }
    if message.reasoning is None:
        return plain
    # reasoning under both names that templates read, as in transformers
    reasoning = next(plain[key] for key in kept.REASONING if key in plain)
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _common(
    message: Message,
    typed: ControlTokens,
    answered: ControlTokens,
    escaped: list[str],
    *,
    arguments_as: Callable[[Any], Any],
    no_content: str | None,
) -> dict[str, Any]:
    """The keys that most templates read, with reasoning under both of its names."""
    tokens = answered if message.role == "assistant" else typed
    content = escape(message.content, tokens, escaped)
    plain: dict[str, Any] = {"role": message.role, "content": no_content if message.tool_calls and not content else content}
    if message.reasoning is not None:
        reasoning = escape(message.reasoning, tokens, escaped)
        plain |= {"reasoning_content": reasoning, "thinking": reasoning}
    if message.tool_calls:
        plain["tool_calls"] = [_common_call(call, tokens, escaped, arguments_as) for call in message.tool_calls]
    used = (*plain, *kept.REASONING, "tool_calls", "function_call")
    others = {key: value for key, value in (message.written or {}).items() if key not in used}
    return plain | escape(others, tokens, escaped)


def _json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _as_it_is(arguments: Any) -> Any:
    return arguments


COMMON_LAYOUTS: tuple[MessageLayout, ...] = tuple(
    functools.partial(_common, arguments_as=arguments_as, no_content=no_content)
    for no_content in ("", None)
    for arguments_as in (_as_it_is, _json)
)
"""Arguments are objects, as most templates need, or JSON text. The content of a message with tool calls only is empty, or null
(DeepSeek V3)."""
as_objects = COMMON_LAYOUTS[0]


def _common_call(
    call: Mapping[str, Any], tokens: ControlTokens, escaped: list[str], arguments_as: Callable[[Any], Any]
) -> dict[str, Any]:
    name, arguments = name_and_arguments(call)
    function = escape({"name": name, "arguments": arguments}, tokens, escaped)
    function["arguments"] = arguments_as(function["arguments"])
    named = {"id": call["id"]} if "id" in call else {}
    return {"type": "function", **named, "function": function}
