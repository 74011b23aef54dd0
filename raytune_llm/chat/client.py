"""An HTTP client of the OpenAI API, for our server and for others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from raytune_llm.errors import DataError, ResourceError

CONNECT_S = 10.0


class Model(NamedTuple):
    id: str
    parent: str | None
    """The base model, if this is an adapter."""


class Prompt(NamedTuple):
    """A rendered prompt."""

    text: str
    tokens: int
    max_length: int | None
    """Maximum tokens of a prompt and its answer. None: the server does not report it."""


class Piece(NamedTuple):
    """A part of a streamed answer."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(slots=True)
class Answer:
    """An answer, complete or still being streamed. Times are of time.monotonic, in seconds."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Tool calls, in the form of the API's messages."""
    finish: str | None = None
    """The finish reason. None: the stream has not ended."""
    prompt_tokens: int | None = None
    """None, here and in `tokens`: the server did not report it."""
    tokens: int | None = None
    """Tokens of the answer."""
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Time of the first token."""
    last: float | None = None

    def add(self, chunk: Mapping[str, Any]) -> Iterator[Piece]:
        """Add a chunk of the stream, and yield its parts."""
        if (usage := chunk.get("usage")) is not None:
            self.prompt_tokens, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")  # vLLM's old name and its new one
            if reasoning or delta.get("content") or delta.get("tool_calls"):
                self.last = time.monotonic()
                self.first = self.first or self.last
            if reasoning:
                self.reasoning += reasoning
                yield Piece("reasoning", reasoning)
            if delta.get("content"):
                self.text += delta["content"]
                yield Piece("content", delta["content"])
            for call in delta.get("tool_calls") or ():
                self._add_call(call)
            self.finish = choice.get("finish_reason") or self.finish

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        message |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        return message | ({"tool_calls": self.calls} if self.calls else {})

    @property
    def first_s(self) -> float | None:
        """Seconds until the first token."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token."""
        if self.tokens is None or self.tokens < 2 or self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def _add_call(self, delta: Mapping[str, Any]) -> None:
        """Add a part of a tool call. The first part has the name; the arguments may come in several parts."""
        if delta["index"] >= len(self.calls):
            self.calls.append({"id": delta.get("id") or "", "type": "function", "function": {"name": "", "arguments": ""}})
        function, part = self.calls[delta["index"]]["function"], delta["function"]
        function["name"] += part.get("name") or ""
        function["arguments"] += part.get("arguments") or ""


class Client:
    """Methods raise ResourceError if the server can't be reached or answers with an error, and DataError for what is no text."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def at(cls, url: str, api_key: str | None) -> Client:
        """url: the server's address, with or without /v1."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base_url = url.rstrip("/").removesuffix("/v1")
        # no timeout for answers, whose duration has no bound
        return cls(httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S)))

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        """The base model first."""
        listed = self._json(lambda: self._http.get("/v1/models"))["data"]
        return sorted((Model(one["id"], one.get("parent")) for one in listed), key=lambda model: model.parent is not None)

    def stream(self, answer: Answer, body: Mapping[str, Any]) -> Generator[Piece]:
        """Fill `answer`, and yield its parts as they come. Closing the generator cancels the request."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _reached(self._http.base_url), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
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
        """The prompt of these messages, by the server's tokenizer and chat template."""
        body = {"model": model, "messages": messages, **settings}
        tokenized = self._json(lambda: self._http.post("/tokenize", json=body))
        text = tokenized.get("prompt")
        if text is None:  # vLLM returns token ids only
            ids = {"model": model, "tokens": tokenized["tokens"]}
            text = self._json(lambda: self._http.post("/detokenize", json=ids))["prompt"]
        return Prompt(text, tokenized["count"], tokenized.get("max_model_len"))

    def _json(self, request: Callable[[], httpx.Response]) -> Any:
        with _reached(self._http.base_url):
            response = request()
        if response.is_error:
            raise _refusal(response)
        return response.json()


@contextmanager
def _reached(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise ResourceError(f"the server at {url} does not answer ({error})", "Is it running, and is chat.url right?") from None
    except UnicodeEncodeError as error:
        raise DataError("the conversation", f"must be text in UTF-8, and holds {error.object[error.start]!r}") from None


def _refusal(response: httpx.Response) -> ResourceError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500] or response.reason_phrase
    fix = "Set chat.api_key or RAYTUNE_LLM_API_KEY." if response.status_code == 401 else ""
    return ResourceError(f"the server answers {response.status_code}: {str(message).rstrip('.')}", fix)
