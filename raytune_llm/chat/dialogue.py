"""A conversation with a base model and its adapters: messages, tools and sampling settings."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.chat.client import Answer, Client, Model, Piece, Prompt
from raytune_llm.config.paths import expanded
from raytune_llm.errors import ConfigError, DataError, UserError

SETTINGS: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "min_tokens": int, "seed": int,
    "stop": str, "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip
"""Sampling settings, by the API's names. The server checks their values."""


@dataclass
class Dialogue:
    client: Client
    models: Sequence[Model]
    """The base model first."""
    model: str
    """Id of the model that answers."""
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    """None: the chat template decides."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    """All but the system message, in the API's form."""

    @property
    def base(self) -> str:
        return self.models[0].id

    @property
    def open_call(self) -> dict[str, Any] | None:
        """The newest tool call without a result, if there is one since the last user message."""
        answered = {message.get("tool_call_id") for message in self.messages}
        for message in reversed(self.messages):
            if message["role"] == "user":
                return None
            for call in message.get("tool_calls") or ():
                if call.get("id") not in answered:
                    return call
        return None

    def say(self, text: str) -> None:
        """Add a user message, or the result of the open tool call."""
        if (call := self.open_call) is not None:
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        else:
            self.messages.append({"role": "user", "content": text})

    def ask(self, answer: Answer) -> Generator[Piece]:
        """Stream the model's answer. What was received is added to the conversation, also if the stream is stopped."""
        try:
            yield from self.client.stream(answer, self.request(self.model))
        finally:
            if answer.text or answer.reasoning or answer.calls or answer.finish:
                self.messages.append(answer.message())

    @contextmanager
    def unchanged_by_errors(self) -> Iterator[None]:
        """A context that restores the messages if a UserError ends it, so that a failed question leaves no trace."""
        before = list(self.messages)
        try:
            yield
        except UserError:
            self.messages = before
            raise

    def request(self, model: str) -> dict[str, Any]:
        """The body of a chat completion request."""
        body = {"model": model, "messages": self.all_messages, **self.settings, **self._template_settings}
        return body | ({"tools": self.tools} if self.tools else {})

    @property
    def all_messages(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    @property
    def question(self) -> str | None:
        """The last user message."""
        return next((message["content"] for message in reversed(self.messages) if message["role"] == "user"), None)

    def prompt(self) -> Prompt:
        """The prompt of the last answer, or of the next one if the user has spoken last."""
        messages = self.all_messages
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ConfigError("the conversation", "is empty", fix="Say something first.")
        return self.client.prompt(
            self.model, messages, **({"tools": self.tools} if self.tools else {}), **self._template_settings
        )

    def undo(self) -> bool:
        """Remove the last user message and all that follows. False: there is none."""
        while self.messages:
            if self.messages.pop()["role"] == "user":
                return True
        return False

    def remove_answer(self) -> bool:
        """Remove the last answer. False: no message is left that could be answered."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def refresh(self) -> None:
        """Ask which adapters there are: a server may have got others."""
        self.models = self.client.models() or self.models

    def use(self, name: str) -> None:
        """Let an adapter answer, or the base model (`none`)."""
        known = [model.id for model in self.models]
        if name == "none" and self.models[0].parent is not None:
            rule = f"can't be none: {self.base} is part of the model"
            raise ConfigError("the adapter", rule, fix="For the base, start chat without this adapter.")
        chosen = self.base if name == "none" else name
        if chosen not in known:
            raise ConfigError("the adapter", f"must be none or one of {', '.join(known[1:]) or 'none is loaded'}", got=name)
        self.model = chosen

    def set(self, name: str, value: str) -> None:
        """Change a sampling setting; `none` restores the server's default."""
        if name not in SETTINGS:
            raise ConfigError("the setting", f"must be one of {', '.join(SETTINGS)}", got=name)
        if value == "none":
            self.settings.pop(name, None)
            return
        kind = SETTINGS[name]
        try:
            read = kind(value)
        except ValueError:
            read = math.nan
        if isinstance(read, float) and not math.isfinite(read):
            raise ConfigError(name, f"must be {'a whole number' if kind is int else 'a number'}", got=value)
        self.settings[name] = read

    def save(self, path: Path) -> None:
        """Write the conversation as a row that `data=openai` trains on. An existing file is replaced."""
        row = {"messages": self.all_messages, **({"tools": self.tools} if self.tools else {})}
        try:
            write_atomically(path, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(str(path), f"can't be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        """Replace the conversation by a saved one. Raises DataError for a file that has none."""
        row = _json_of(path)
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise DataError(str(path), 'must hold one conversation: {"messages": [{"role": ..., "content": ...}, ...]}')
        tools = _checked_tools(row.get("tools") or [], path)
        begins = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.system = begins[0].get("content") if begins else None
        self.messages, self.tools = messages[len(begins) :], tools

    def load_tools(self, path: Path) -> None:
        """Raises DataError for a file that is not a JSON list of tools."""
        self.tools = _checked_tools(_json_of(path), path)

    @property
    def _template_settings(self) -> dict[str, Any]:
        return {} if self.thinking is None else {"chat_template_kwargs": {"enable_thinking": self.thinking}}


def _is_message(value: Any) -> bool:
    """It has a role, a text or texts, and calls of functions by their names."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    kinds = (str, type(None)) if value["role"] == "system" else (str, list, type(None))
    calls = value.get("tool_calls") or []
    return isinstance(value.get("content"), kinds) and isinstance(calls, list) and all(map(_has_name, calls))


def _has_name(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _checked_tools(tools: Any, path: Path) -> list[dict[str, Any]]:
    """Functions alone become tools. Raises DataError."""
    found: list[Any] = tools if isinstance(tools, list) else [None]
    found = [{"type": "function", "function": one} if isinstance(one, dict) and "function" not in one else one for one in found]
    if not all(map(_has_name, found)):
        raise DataError(str(path), "must hold a list of tools, as in the API")
    return found


def _json_of(path: Path) -> Any:
    try:
        return json.loads(expanded(str(path)).read_text())
    except OSError as error:
        raise DataError(str(path), f"can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(str(path), f"must be JSON ({error})") from None
