"""A server of the OpenAI API, asked over HTTP: one of ours, or another program's."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from raytune_llm.errors import ResourceError

CONNECT_S = 10.0


class Model(NamedTuple):
    id: str
    parent: str | None
    """The base, of an adapter."""


class Prompt(NamedTuple):
    """What a model is asked with."""

    text: str
    tokens: int
    max_length: int | None
    """Tokens of a prompt and its answer, at most."""


class Piece(NamedTuple):
    """Of an answer, as it comes."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(slots=True)
class Answer:
    """In the making, or done."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """As messages of the API hold them."""
    finish: str | None = None
    """None: it was not told to the end."""
    prompt_tokens: int | None = None
    """None, here and below: the server did not tell."""
    tokens: int | None = None
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    """When its first token was there."""
    last: float | None = None

    def add(self, chunk: Mapping[str, Any]) -> Iterator[Piece]:
        """What the chunk says."""
        if (usage := chunk.get("usage")) is not None:
            self.prompt_tokens, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk["choices"]:
            said = choice["delta"]
            reasoning = said.get("reasoning_content") or said.get("reasoning")  # vLLM's old name and its new one
            if reasoning or said.get("content") or said.get("tool_calls"):
                self.last = time.monotonic()
                self.first = self.first or self.last
            if reasoning:
                self.reasoning += reasoning
                yield Piece("reasoning", reasoning)
            if said.get("content"):
                self.text += said["content"]
                yield Piece("content", said["content"])
            for call in said.get("tool_calls") or ():
                self._add_call(call)
            self.finish = choice.get("finish_reason") or self.finish

    def message(self) -> dict[str, Any]:
        """For the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        message |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        return message | ({"tool_calls": self.calls} if self.calls else {})

    @property
    def first_s(self) -> float | None:
        """Seconds that its first token took."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token."""
        if self.tokens is None or self.tokens < 2 or self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def _add_call(self, told: Mapping[str, Any]) -> None:
        """The first piece of a call has its name, and its arguments may come in several."""
        if told["index"] >= len(self.calls):
            self.calls.append({"id": told.get("id") or "", "type": "function", "function": {"name": "", "arguments": ""}})
        function, said = self.calls[told["index"]]["function"], told["function"]
        function["name"] += said.get("name") or ""
        function["arguments"] += said.get("arguments") or ""


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def at(cls, url: str, api_key: str | None) -> Client:
        """A server's address, with or without its /v1."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base_url = url.rstrip("/").removesuffix("/v1")
        # An answer may take as long as it takes.
        return cls(httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S)))

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        """The base first."""
        told = self._told(lambda: self._http.get("/v1/models"))["data"]
        return sorted((Model(one["id"], one.get("parent")) for one in told), key=lambda model: model.parent is not None)

    def stream(self, answer: Answer, body: Mapping[str, Any]) -> Generator[Piece]:
        """The answer's pieces, as they are put into it. Closing it cancels the answer."""
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _reached(self._http.base_url), self._http.stream("POST", "/v1/chat/completions", json=wanted) as response:
            if response.is_error:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ResourceError(f"the answer was interrupted: {chunk['error'].get('message')}")
                yield from answer.add(chunk)

    def prompt(self, model: str, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Prompt:
        """What the model would be asked with."""
        body = {"model": model, "messages": messages, **settings}
        told = self._told(lambda: self._http.post("/tokenize", json=body))
        text = told.get("prompt")
        if text is None:  # vLLM tells the ids alone
            ids = {"model": model, "tokens": told["tokens"]}
            text = self._told(lambda: self._http.post("/detokenize", json=ids))["prompt"]
        return Prompt(text, told["count"], told.get("max_model_len"))

    def _told(self, ask: Any) -> Any:
        with _reached(self._http.base_url):
            response = ask()
        if response.is_error:
            raise _refusal(response)
        return response.json()


@contextmanager
def _reached(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise ResourceError(f"the server at {url} does not answer ({error})", "Is it running, and is chat.url right?") from None


def _refusal(response: httpx.Response) -> ResourceError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500] or response.reason_phrase
    fix = "Set chat.api_key or RAYTUNE_LLM_API_KEY." if response.status_code == 401 else ""
    return ResourceError(f"the server answers {response.status_code}: {str(message).rstrip('.')}", fix)
