"""An HTTP client of the OpenAI API, for our server and for others."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from raytune_llm.errors import ConfigError, DataError, ResourceError

CONNECT_S = 10.0
JSON = {"content-type": "application/json"}


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
            self.prompt_tokens, self.tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
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
        number, part = delta.get("index") or 0, delta.get("function") or {}
        if number >= len(self.calls):
            self.calls.append({"id": delta.get("id") or "", "type": "function", "function": {"name": "", "arguments": ""}})
        function = self.calls[number]["function"]
        function["name"] += part.get("name") or ""
        function["arguments"] += part.get("arguments") or ""


class Client:
    """Methods raise ResourceError if the server can't be reached, answers with an error, or not as this API does, and DataError
    for what is no text."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    @classmethod
    def at(cls, url: str, api_key: str | None) -> Client:
        """url: the server's address, with or without /v1. Raises ConfigError for what is none, and for what can be no key."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base_url = url.rstrip("/").removesuffix("/v1")
        try:
            # no timeout for answers, whose duration has no bound
            return cls(httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S)))
        except UnicodeEncodeError:
            raise ConfigError("chat.api_key", "must be of ASCII characters", got="others") from None
        except httpx.InvalidURL as error:
            raise ConfigError("chat.url", f"must be an address ({error})", got=url) from None

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        """The base model first."""
        with self._asked():
            listed = self._json("GET", "/v1/models")["data"]
            return sorted((Model(one["id"], one.get("parent")) for one in listed), key=lambda model: model.parent is not None)

    def stream(self, answer: Answer, body: Mapping[str, Any]) -> Generator[Piece]:
        """Fill `answer`, and yield its parts as they come. Closing the generator cancels the request. Where fewer tokens than
        max_tokens are left of the context, it may be as long as these."""
        sent = _encoded({**body, "stream": True, "stream_options": {"include_usage": True}})
        with self._asked(), self._http.stream("POST", "/v1/chat/completions", content=sent, headers=JSON) as response:
            if response.is_success:
                for data in _events(response):
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ResourceError(f"the answer was interrupted: {_message(chunk)}")
                    yield from answer.add(chunk)
                return
            response.read()
            if "max_tokens" not in body or _code(response) != "context_length_exceeded":
                raise _refusal(response)
        yield from self.stream(answer, {name: value for name, value in body.items() if name != "max_tokens"})

    def prompt(self, model: str, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Prompt:
        """The prompt of these messages, by the server's tokenizer and chat template."""
        body = _encoded({"model": model, "messages": messages, **settings})
        with self._asked():
            tokenized = self._json("POST", "/tokenize", body)
            text = tokenized.get("prompt")
            if text is None:  # vLLM returns token ids only
                text = self._json("POST", "/detokenize", _encoded({"model": model, "tokens": tokenized["tokens"]}))["prompt"]
            return Prompt(text, tokenized["count"], tokenized.get("max_model_len"))

    def _json(self, method: str, path: str, body: bytes | None = None) -> Any:
        response = self._http.request(method, path, content=body, headers=JSON)
        if not response.is_success:
            raise _refusal(response)
        return response.json()

    @contextmanager
    def _asked(self) -> Iterator[None]:
        url, fix = self._http.base_url, "Is it running, and is chat.url right?"
        try:
            yield
        except httpx.HTTPError as error:
            raise ResourceError(f"the server at {url} does not answer ({error})", fix) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResourceError(f"the server at {url} does not answer as OpenAI's API does ({error!r})", fix) from None


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise DataError("the conversation", f"must be text in UTF-8, and holds {error.object[error.start]!r}") from None
    except (ValueError, RecursionError) as error:
        raise DataError("the conversation", f"must be JSON ({error})") from None


def _events(response: httpx.Response) -> Iterator[str]:
    """The data of server-sent events. Lines end with a line feed: httpx would also end them at U+2028, which texts may hold."""
    held = ""
    for text in response.iter_text():
        *lines, held = (held + text).split("\n")
        for line in lines:
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                yield data


def _message(body: Any) -> str:
    error = body["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _code(response: httpx.Response) -> Any:
    try:
        return response.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None


def _refusal(response: httpx.Response) -> ResourceError:
    try:
        message = _message(response.json())
    except (ValueError, KeyError, TypeError):
        message = response.text[:500] or response.reason_phrase
    fix = "Set chat.api_key or RAYTUNE_LLM_API_KEY." if response.status_code == 401 else ""
    return ResourceError(f"the server answers {response.status_code}: {message.rstrip('.')}", fix)
