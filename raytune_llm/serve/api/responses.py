"""Builds the API's responses, complete or as stream chunks, from the output of an engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llm.data.templates.tool_calls import ToolCall
from raytune_llm.engines.requests import Completion, Delta, TokenLogprob
from raytune_llm.serve.api.schema import ChatRequest, CompletionRequest
from raytune_llm.serve.output_parser import OutputParser, OutputPart, OutputSyntax


@dataclass(slots=True)
class Usage:
    """Token counts of a response: prompt tokens, those of them found in the prefix cache, and generated tokens."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, delta: Delta) -> None:
        if (completion := delta.completion) is not None:
            self.prompt += completion.prompt_tokens
            self.cached += completion.cached_tokens
            self.completion += len(completion.ids)

    def as_json(self, choices: int) -> dict[str, Any]:
        """choices: `n` of the request; the tokens of a prompt with several choices count once, as in OpenAI's API."""
        prompt, cached = self.prompt // choices, self.cached // choices
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Collected:
    """Collects the completions of all choices of a request, by index."""

    def __init__(self, number: int) -> None:
        self.completions: list[Completion | None] = [None] * number
        self.usage = Usage()

    def add(self, index: int, delta: Delta) -> None:
        self.usage.add(delta)
        if delta.completion is not None:
            self.completions[index] = delta.completion

    def all(self) -> list[Completion]:
        return [completion for completion in self.completions if completion is not None]


class ChatResponse:
    """The response to one chat completion request."""

    def __init__(self, body: ChatRequest, tokenizer: Any, syntax: OutputSyntax, *, forced: bool, created: int) -> None:
        """forced: a grammar forces the answer to be one tool call as JSON. created: Unix time."""
        self._body, self._tokenizer, self._syntax, self._forced = body, tokenizer, syntax, forced
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": body.model}
        names = frozenset(body.tool_names) if body.tools else None
        self._parsers = [OutputParser(syntax, names) for _ in range(body.n or 1)]
        self._begun = [False] * (body.n or 1)
        self._json = [""] * (body.n or 1)
        """Text of a forced call so far, per choice."""
        self._calls = [0] * (body.n or 1)
        """Tool calls streamed so far, per choice."""

    def full(self, collected: Collected) -> dict[str, Any]:
        choices = [self._choice(index, completion) for index, completion in enumerate(collected.all())]
        usage = collected.usage.as_json(len(choices))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage, "system_fingerprint": None}

    def chunks(self, index: int, delta: Delta, *, usage: str | None) -> Iterator[dict[str, Any]]:
        """The stream chunks for a delta of choice `index`. usage: not None adds `usage: null`, since a usage chunk follows."""

        def chunk(content: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": finish}
            later = {"usage": None} if usage else {}
            return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **later}

        if not self._begun[index]:
            self._begun[index] = True
            yield chunk({"role": "assistant", "content": ""})
        parts = self._parts(index, delta.text, final=delta.completion is not None)
        logprobs = self._logprobs(delta.logprobs)
        for part in parts:
            yield chunk(self._chunk_delta(index, part), logprobs=logprobs)
            logprobs = None  # only in the first chunk
        if logprobs is not None and (delta.completion is None or delta.logprobs):
            yield chunk({}, logprobs=logprobs)
        if delta.completion is not None:
            yield chunk({}, self._finish(index, delta.completion))

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        counts = usage.as_json(self._body.n or 1)
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": counts}

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        parts = self._parts(index, completion.text, final=True)
        content = "".join(part.text for part in parts if part.kind == "content")
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        calls = [_call(part) for part in parts if part.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": self._finish(index, completion),
        }

    def _parts(self, index: int, text: str, *, final: bool) -> list[OutputPart]:
        if self._forced:
            self._json[index] += text
            return _forced_call(self._json[index]) if final else []
        parser = self._parsers[index]
        parts = parser.push(text) if text else []
        return [*parts, *parser.finish()] if final else parts

    def _chunk_delta(self, index: int, part: OutputPart) -> dict[str, Any]:
        if part.kind == "call":
            number, self._calls[index] = self._calls[index], self._calls[index] + 1
            return {"tool_calls": [{"index": number, **_call(part)}]}
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}

    def _finish(self, index: int, completion: Completion) -> str:
        called = self._parsers[index].calls or (self._forced and completion.finish == "stop")
        return "tool_calls" if called and completion.finish == "stop" else _finish_reason(completion)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._logprob(one) for one in logprobs], "refusal": None}

    def _logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [{**_token(self._tokenizer, token), "logprob": value} for token, value in one.top]
        return {**_token(self._tokenizer, one.token), "logprob": one.logprob, "top_logprobs": top}


class CompletionResponse:
    """The response to one plain completion request."""

    def __init__(self, body: CompletionRequest, tokenizer: Any, *, created: int, prompts: Sequence[Sequence[int]]) -> None:
        self._body, self._tokenizer, self._prompts = body, tokenizer, prompts
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": created,
            "model": body.model,
        }
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def full(self, collected: Collected) -> dict[str, Any]:
        completions = collected.all()
        choices = [
            self._choice(index, self._echo(index) + one.text, one.logprobs, _finish_reason(one))
            for index, one in enumerate(completions)
        ]
        return {**self._head, "choices": choices, "usage": collected.usage.as_json(self._body.n or 1), "system_fingerprint": None}

    def chunks(self, index: int, delta: Delta, *, usage: str | None) -> Iterator[dict[str, Any]]:
        text = delta.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo(index) + text
        finish = None if delta.completion is None else _finish_reason(delta.completion)
        later = {"usage": None} if usage else {}
        yield {**self._head, "choices": [self._choice(index, text, delta.logprobs, finish)], **later}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.as_json(self._body.n or 1)}

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        return self._tokenizer.decode(list(self._prompts[index // (self._body.n or 1)]), skip_special_tokens=True)

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        words = [self._tokenizer.decode([one.token]) for one in logprobs]
        offsets = []
        for word in words:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(word)
        return {
            "tokens": words,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._tokenizer.decode([token]): value for token, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }


def _finish_reason(completion: Completion) -> str:
    return "length" if completion.finish == "length" else "stop"


def _call(part: OutputPart) -> dict[str, Any]:
    assert part.call is not None
    function = {"name": part.call.name, "arguments": part.call.arguments}
    return {"id": part.id, "type": "function", "function": function}


def _forced_call(text: str) -> list[OutputPart]:
    """The tool call in the JSON of a forced call; an incomplete one becomes content."""
    try:
        called = json.loads(text)
        call = ToolCall(called["name"], json.dumps(called["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError, RecursionError):
        return [OutputPart("content", text)] if text else []
    return [OutputPart("call", call=call, id=f"call_{secrets.token_hex(12)}")]


def _token(tokenizer: Any, token: int) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "bytes": list(text.encode())}
