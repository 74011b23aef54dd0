"""Builds the API's responses, complete or as stream chunks, from the output of an engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llm.engines.requests import Completion, Delta, TokenLogprob
from raytune_llm.serve.answer_parser import OutputPart
from raytune_llm.serve.api.schema import ChatRequest, CompletionRequest
from raytune_llm.serve.output_parser import OutputSyntax, parser_of
from raytune_llm.serve.token_bytes import TextOffsets, TokenBytes


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

    def __init__(self, body: ChatRequest, tokens: TokenBytes, syntax: OutputSyntax, *, created: int) -> None:
        """created: Unix time."""
        self._body, self._tokens = body, tokens
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": body.model}
        names = frozenset(body.tool_names) if body.tools else None
        self._parsers = [parser_of(syntax, names) for _ in range(body.n or 1)]
        self._begun = [False] * (body.n or 1)
        self._calls = [0] * (body.n or 1)
        """Tool calls so far, per choice."""

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
        for part, call in parts:
            yield chunk(_chunk_delta(part, call), logprobs=logprobs)
            logprobs = None  # only in the first chunk
        if logprobs is not None and (delta.completion is None or delta.logprobs):
            yield chunk({}, logprobs=logprobs)
        if delta.completion is not None:
            yield chunk({}, self._finish(index, delta.completion))

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        counts = usage.as_json(self._body.n or 1)
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": counts}

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        parts = [part for part, _ in self._parts(index, completion.text, final=True)]
        content = "".join(part.text for part in parts if part.kind == "content")
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        calls = _calls(parts)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": self._finish(index, completion),
        }

    def _parts(self, index: int, text: str, *, final: bool) -> list[tuple[OutputPart, int]]:
        """The new parts of a choice's answer, each with the number of the newest call."""
        parser = self._parsers[index]
        parts = parser.push(text) if text else []
        kept: list[tuple[OutputPart, int]] = []
        for part in [*parts, *parser.finish()] if final else parts:
            self._calls[index] += part.kind == "call"
            of_later_call = self._calls[index] > 1 and part.kind in ("call", "arguments")
            if self._body.parallel_tool_calls is not False or not of_later_call:
                kept.append((part, self._calls[index] - 1))
        return kept

    def _finish(self, index: int, completion: Completion) -> str:
        called = self._calls[index] and completion.finish == "stop"
        return "tool_calls" if called else _finish_reason(completion)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._logprob(one) for one in logprobs], "refusal": None}

    def _logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [{**self._token(token), "logprob": value} for token, value in one.top]
        return {**self._token(one.token), "logprob": one.logprob, "top_logprobs": top}

    def _token(self, token: int) -> dict[str, Any]:
        return {"token": self._tokens.text(token), "bytes": list(self._tokens.of(token))}


class CompletionResponse:
    """The response to one plain completion request."""

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Any,
        tokens: TokenBytes,
        *,
        created: int,
        prompts: Sequence[Sequence[int]],
        prompt_logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> None:
        """prompt_logprobs: for each prompt, of its tokens after the first, where they are to be returned with the prompt."""
        self._body, self._tokenizer, self._tokens = body, tokenizer, tokens
        self._prompts, self._prompt_logprobs = prompts, prompt_logprobs
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": created,
            "model": body.model,
        }
        self._begun: set[int] = set()
        goes_on = prompt_logprobs is None
        self._offsets = [TextOffsets(tokens, goes_on=goes_on) for _ in range(len(prompts) * (body.n or 1))]

    def full(self, collected: Collected) -> dict[str, Any]:
        completions = collected.all()
        choices = [
            self._choice(index, one.text, one.logprobs, _finish_reason(one), first=True) for index, one in enumerate(completions)
        ]
        return {**self._head, "choices": choices, "usage": collected.usage.as_json(self._body.n or 1), "system_fingerprint": None}

    def chunks(self, index: int, delta: Delta, *, usage: str | None) -> Iterator[dict[str, Any]]:
        first = index not in self._begun
        self._begun.add(index)
        finish = None if delta.completion is None else _finish_reason(delta.completion)
        later = {"usage": None} if usage else {}
        yield {**self._head, "choices": [self._choice(index, delta.text, delta.logprobs, finish, first=first)], **later}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.as_json(self._body.n or 1)}

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        given = self._body.prompts[index // (self._body.n or 1)]
        return given if isinstance(given, str) else self._tokenizer.decode(given, skip_special_tokens=True)

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None, *, first: bool
    ) -> dict[str, Any]:
        """first: nothing of this choice was returned before."""
        if first:
            text = self._echo(index) + text
        return {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs, first), "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob], first: bool) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        tokens: list[int] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        shown: Sequence[int] = ()  # places of the prompt's tokens, where it was given as a text
        if first and self._prompt_logprobs is not None:
            number = index // (self._body.n or 1)
            ids, given = self._prompts[number], self._body.prompts[number]
            tokens, values, top = [ids[0]], [None], [None]  # it follows nothing
            logprobs = [*self._prompt_logprobs[number], *logprobs]
            if isinstance(given, str):
                shown = range(0 if given.startswith(self._tokens.text(ids[0])) else 1, len(ids))  # without one put before it
        for one in logprobs:
            tokens.append(one.token)
            values.append(one.logprob)
            top.append({self._tokens.text(token): value for token, value in (*one.top, (one.token, one.logprob))})
        return {
            "tokens": [self._tokens.text(token) for token in tokens],
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": [self._offsets[index].place(token, is_shown=at in shown) for at, token in enumerate(tokens)],
        }


def _finish_reason(completion: Completion) -> str:
    return "length" if completion.finish == "length" else "stop"


def _chunk_delta(part: OutputPart, call: int) -> dict[str, Any]:
    match part.kind:
        case "call":
            return {"tool_calls": [{"index": call, **_call(part)}]}
        case "arguments":
            return {"tool_calls": [{"index": call, "function": {"arguments": part.text}}]}
        case "reasoning":
            return {"reasoning_content": part.text}
        case "content":
            return {"content": part.text}


def _call(part: OutputPart) -> dict[str, Any]:
    """A call whose arguments follow."""
    return {"id": part.id, "type": "function", "function": {"name": part.text, "arguments": ""}}


def _calls(parts: Sequence[OutputPart]) -> list[dict[str, Any]]:
    """The complete calls."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.kind == "call":
            calls.append(_call(part))
        elif part.kind == "arguments":
            calls[-1]["function"]["arguments"] += part.text
    return calls
