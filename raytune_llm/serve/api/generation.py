"""The endpoints that generate text: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from raytune_llm.engines.requests import Request as EngineRequest
from raytune_llm.engines.requests import Sampling
from raytune_llm.serve.api.errors import invalid
from raytune_llm.serve.api.responses import ChatResponse, Collected, CompletionResponse
from raytune_llm.serve.api.sampling import after_thought, forced_tool_grammar, grammar_of, sampling_of, strict_tools_grammar
from raytune_llm.serve.api.schema import ChatRequest, CompletionRequest, NamedTool
from raytune_llm.serve.api.server import Server, headers_of
from raytune_llm.serve.api.streams import LatencyTimer, before_disconnect, events, merged, with_first
from raytune_llm.serve.prompts import Prompts


@dataclass(frozen=True)
class Generation:
    server: Server

    def routes(self) -> APIRouter:
        router = APIRouter(dependencies=[Depends(self.server.user)])
        may_stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
        router.post("/v1/chat/completions", response_model=None, responses=may_stream)(self.chat_completions)
        router.post("/v1/completions", response_model=None, responses=may_stream)(self.completions)
        return router

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        self.server.check_generates()
        adapter = await self.server.adapter_of(body.model)
        prompts, facts = self.server.prompts, self.server.backend.facts
        settings = dict(body.chat_template_kwargs or {})
        forced = _forced_tools(body)
        body.ignored = sorted([*body.ignored, *_without_effect(body, prompts)])
        if body.reasoning_effort is not None:
            settings.setdefault("enable_thinking", body.reasoning_effort != "none")
        tools = None if body.tool_choice == "none" else body.tools
        ids, syntax = await prompts.chat(body.messages, tools, settings)
        ignored: set[str] = set()
        if forced:
            grammar = forced_tool_grammar(forced, ignored)
        else:
            grammar = grammar_of(body.response_format, body.structured_outputs, ignored)
        body.ignored = sorted({*body.ignored, *ignored})
        strict = None if forced else strict_tools_grammar(tools or (), syntax.calls.format if syntax.calls else None)
        if grammar is not None and strict is not None:
            raise invalid("A strict tool and a format of the answer can't both be given: leave out one of them", "tools")
        if grammar is not None and (thought := syntax.thought_before_grammar) is not None:
            grammar = after_thought(grammar, *thought)
        if grammar is not None:
            syntax = syntax.under_grammar(is_call=bool(forced))
        sampling = sampling_of(
            body,
            limit=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar or strict,
            prompt_tokens=len(ids),
            max_length=facts.max_length,
            vocabulary=len(prompts.tokenizer),
            shown_ids=prompts.special_ids((*syntax.words, *(body.stop or ()))),
        )
        response = ChatResponse(body, prompts.token_bytes, syntax, created=int(time.time()))
        return await self._respond(request, body, [ids], adapter, sampling, response, goes_on=False)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.server.check_generates()
        adapter = await self.server.adapter_of(body.model)
        prompts = self.server.prompts
        ids = await self.server.ids_of(body.prompts, "prompt")
        sampling = sampling_of(
            body,
            limit=body.max_tokens or 16,
            logprobs=body.logprobs,
            grammar=grammar_of(None, body.structured_outputs, set()),
            prompt_tokens=max(map(len, ids)),
            max_length=self.server.backend.facts.max_length,
            vocabulary=len(prompts.tokenizer),
            shown_ids=prompts.special_ids(body.stop or ()),
        )
        of_prompts = None
        if body.echo and body.logprobs is not None:
            asked = [self.server.backend.prompt_logprobs(one, adapter, body.logprobs) for one in ids]
            of_prompts = await before_disconnect(request, asyncio.gather(*asked))
        response = CompletionResponse(
            body,
            prompts.tokenizer,
            prompts.token_bytes,
            created=int(time.time()),
            prompts=ids,
            prompt_logprobs=of_prompts,
        )
        return await self._respond(request, body, ids, adapter, sampling, response, goes_on=True)

    async def _respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        adapter: str | None,
        sampling: Sampling,
        response: ChatResponse | CompletionResponse,
        *,
        goes_on: bool,
    ) -> Response:
        """Generate body.n answers to each prompt, and send them at once or as a stream of events. goes_on: with its text."""
        began, backend = time.monotonic(), self.server.backend
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
        requests = [
            EngineRequest(prompt_ids=ids, adapter=adapter, sampling=replace(sampling, seed=seed + n), goes_on=goes_on)
            for ids in prompts
            for n in range(body.n or 1)
        ]
        deltas = merged([backend.stream(one) for one in requests])
        first = await before_disconnect(request, anext(deltas))  # so that an error can still be an HTTP status
        seed_is_ignored = body.seed is not None and not backend.facts.keeps_seeds
        headers = headers_of(sorted([*body.ignored, "seed"]) if seed_is_ignored else body.ignored)
        timer = LatencyTimer(self.server.metrics, backend.facts.name, began)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            sent = events(first, deltas, response, usage, timer)
            return StreamingResponse(sent, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        collected = Collected(len(requests))

        async def collect() -> None:
            async for index, delta in with_first(first, deltas):
                timer.observe(index, delta)
                collected.add(index, delta)

        await before_disconnect(request, collect())
        return JSONResponse(response.full(collected), headers=headers)


def _without_effect(body: ChatRequest, prompts: Prompts) -> list[str]:
    """The given fields that change nothing beside the others, or with this chat template."""
    forced, can_think = bool(_forced_tools(body)), prompts.thinking_can_be_set
    given = {
        "reasoning_effort": body.reasoning_effort is not None and not can_think,
        "chat_template_kwargs.enable_thinking": "enable_thinking" in (body.chat_template_kwargs or {}) and not can_think,
        "response_format": body.response_format is not None and forced,
        "structured_outputs": body.structured_outputs is not None and forced,
        "tools": bool(body.tools) and not forced and body.tool_choice != "none" and not prompts.tools_are_told,
    }
    return [name for name, is_ignored in given.items() if is_ignored]


def _forced_tools(body: ChatRequest) -> list[Any]:
    """The tools of which the answer must call one; empty: it need not call any."""
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in body.tools or () if tool.function.name == body.tool_choice.function.name]
    return list(body.tools or ()) if body.tool_choice == "required" else []
