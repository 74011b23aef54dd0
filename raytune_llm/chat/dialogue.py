"""A conversation with one model of several, and what it is asked with."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.chat.client import Answer, Client, Model, Piece, Prompt
from raytune_llm.errors import ConfigError, DataError

SETTINGS: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "min_tokens": int, "seed": int,
    "stop": str, "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip
"""Of an answer, by the API's names; rules about their values are the server's."""


@dataclass
class Dialogue:
    client: Client
    models: Sequence[Model]
    """The base first."""
    model: str
    """That answers."""
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    """None: as the template has it."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    """Without the system's."""

    @property
    def base(self) -> str:
        return self.models[0].id

    @property
    def open_call(self) -> dict[str, Any] | None:
        """A call of a tool whose result is still to be told."""
        told = {message.get("tool_call_id") for message in self.messages}
        for message in reversed(self.messages):
            if message["role"] == "user":
                return None
            for call in message.get("tool_calls", ()):
                if call["id"] not in told:
                    return call
        return None

    def say(self, text: str) -> None:
        """The user's next message, or the result of the call that waits for one."""
        if (call := self.open_call) is not None:
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        else:
            self.messages.append({"role": "user", "content": text})

    def ask(self, answer: Answer) -> Generator[Piece]:
        """The answer to what was said. As much of it as came is in the conversation when it ends, also where it is stopped."""
        try:
            yield from self.client.stream(answer, self.request(self.model))
        finally:
            if answer.text or answer.reasoning or answer.calls or answer.finish:
                self.messages.append(answer.message())

    def request(self, model: str) -> dict[str, Any]:
        body = {"model": model, "messages": self.told, **self.settings, **self._template_settings}
        return body | ({"tools": self.tools} if self.tools else {})

    @property
    def told(self) -> list[dict[str, Any]]:
        """All messages, as the model is told them."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    @property
    def question(self) -> str | None:
        """What the user said last."""
        return next((message["content"] for message in reversed(self.messages) if message["role"] == "user"), None)

    def prompt(self) -> Prompt:
        """Of the next answer; where there is one already, of that one."""
        messages = self.told
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ConfigError("the conversation", "is empty", fix="Say something first.")
        return self.client.prompt(
            self.model, messages, **({"tools": self.tools} if self.tools else {}), **self._template_settings
        )

    def undo(self) -> bool:
        """The last question and all that followed it are unsaid; False where there is none."""
        while self.messages:
            if self.messages.pop()["role"] == "user":
                return True
        return False

    def take_back_answer(self) -> bool:
        """So that it can be asked for anew; False where nothing was said."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def use(self, name: str) -> None:
        """An adapter, or the base (`none`)."""
        known = [model.id for model in self.models]
        chosen = self.base if name == "none" else name
        if chosen not in known:
            raise ConfigError("the adapter", f"must be none or one of {', '.join(known[1:]) or 'none is loaded'}", got=name)
        self.model = chosen

    def set(self, name: str, value: str) -> None:
        """`none` leaves it to the server."""
        if name not in SETTINGS:
            raise ConfigError("the setting", f"must be one of {', '.join(SETTINGS)}", got=name)
        if value == "none":
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = SETTINGS[name](value)
        except ValueError:
            raise ConfigError(name, f"must be {'a whole number' if SETTINGS[name] is int else 'a number'}", got=value) from None

    def save(self, path: Path) -> None:
        """As a row that `data=openai` trains on. A conversation that was loaded from the file takes its place."""
        row = {"messages": self.told, **({"tools": self.tools} if self.tools else {})}
        try:
            write_atomically(path, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(str(path), f"can't be written ({error.strerror})") from None

    def load(self, path: Path) -> None:
        row = _json_of(path)
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise DataError(str(path), 'must hold one conversation: {"messages": [{"role": ..., "content": ...}, ...]}')
        system = [one.get("content") for one in messages if one["role"] == "system"]
        self.system = system[0] if system else None
        self.messages = [one for one in messages if one["role"] != "system"]
        self.tools = row.get("tools") or []

    def take_tools(self, path: Path) -> None:
        tools = _json_of(path)
        if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
            raise DataError(str(path), "must hold a list of tools, as in the API")
        self.tools = [one if "function" in one else {"type": "function", "function": one} for one in tools]

    @property
    def _template_settings(self) -> dict[str, Any]:
        return {} if self.thinking is None else {"chat_template_kwargs": {"enable_thinking": self.thinking}}


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_text())
    except OSError as error:
        raise DataError(str(path), f"can't be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(str(path), f"must be JSON ({error})") from None
