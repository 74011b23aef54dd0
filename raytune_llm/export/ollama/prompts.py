"""Conversations that are rendered by a chat template and by Ollama's template, in the form that each of them reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Message = Mapping[str, Any]
Call = tuple[str, Mapping[str, Any]]
"""Its name and arguments."""


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, *, thought: str = "", calls: Sequence[Call] = ()) -> Message:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return message


def result(content: str) -> Message:
    return {"role": "tool", "content": content}


def tool(name: str, description: str) -> Mapping[str, Any]:
    argument = {"type": "string", "description": f"of {name}"}
    parameters = {"type": "object", "required": ["an_argument"], "properties": {"an_argument": argument}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


@dataclass(frozen=True)
class Prompt:
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None

    def for_ollama(self) -> dict[str, Any]:
        """The values that Ollama's template gets for this conversation."""
        return {
            "System": "\n\n".join(message["content"] for message in self.messages if message["role"] == "system"),
            "Messages": [_for_ollama(message) for message in self.messages],
            "Tools": [{"Function": tool["function"]} for tool in self.tools],
            "IsThinkSet": self.thinking is not None,
            "Think": bool(self.thinking),
        }


def _for_ollama(message: Message) -> dict[str, Any]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [{"Function": {"Name": function["name"], "Arguments": function["arguments"]}} for function in functions]
    thought = message.get("reasoning_content", "")
    return {"Role": message["role"], "Content": message["content"], "Thinking": thought, "ToolCalls": calls}


class Unsaid(Exception):
    """Ollama's template can't say what the chat template writes."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. begins: the text that llama.cpp itself puts before every prompt."""

    tokenizer: Any
    begins: str

    def text(self, prompt: Prompt, *, asks: bool = True) -> str:
        """The rendered conversation. asks: add the generation prompt. Raises Unsaid if the template refuses the conversation."""
        thinking = {} if prompt.thinking is None else {"enable_thinking": prompt.thinking}
        settings = {"tools": list(prompt.tools) or None, "tokenize": False, "add_generation_prompt": asks, **thinking}
        try:
            text = self.tokenizer.apply_chat_template(list(prompt.messages), **settings)
        except (TemplateError, ValueError, TypeError) as error:
            raise Unsaid(f"it refuses {_said(prompt)} ({error})") from None
        if not text.startswith(self.begins):
            raise Unsaid(f"it does not begin with {self.begins}, which llama.cpp puts before every text")
        return text.removeprefix(self.begins)


def _said(prompt: Prompt) -> str:
    turns = ", ".join(f"{message['role']}{' with calls' if 'tool_calls' in message else ''}" for message in prompt.messages)
    return f"a conversation of {turns}{' with tools' if prompt.tools else ''}"
