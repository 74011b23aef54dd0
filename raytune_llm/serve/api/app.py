"""The OpenAI-compatible HTTP API as a FastAPI application over a Backend.

`build_app` has one function per endpoint; below it is what they share: authentication, request limits and error responses.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import secrets
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from raytune_llm.engines.requests import Delta, Sampling
from raytune_llm.engines.requests import Request as EngineRequest
from raytune_llm.errors import ResourceError, UserError
from raytune_llm.serve.adapters import checked_folder, checked_name
from raytune_llm.serve.api.errors import APIError, broken, invalid, overloaded, unauthorized, unknown_model
from raytune_llm.serve.api.metrics import Metrics
from raytune_llm.serve.api.middleware import BodySizeLimit, RequestId
from raytune_llm.serve.api.responses import ChatResponse, Collected, CompletionResponse, Usage
from raytune_llm.serve.api.sampling import forced_tool_grammar, grammar_of, sampling_of, strict_tools_grammar
from raytune_llm.serve.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapter,
    NamedTool,
    PinAdapter,
    ScoreRequest,
    TokenizeRequest,
    UnloadAdapter,
)
from raytune_llm.serve.backend import RETRY_AFTER_S, Backend, Overloaded
from raytune_llm.serve.prompts import Prompts

log = logging.getLogger("raytune_llm.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """API keys and limits."""

    api_key: str | None
    """None: no key is required. config/ allows that only on a loopback address."""
    admin_key: str | None
    """None: adapters can't be changed, unless api_key is None too."""
    roots: Sequence[Path]
    """Folders that adapters may be loaded from."""
    max_body_bytes: int


def build_app(backend: Backend, prompts: Prompts, access: Access) -> FastAPI:
    app = FastAPI(title="raytune_llm", version="1", docs_url="/docs", redoc_url=None)
    facts = backend.facts
    metrics = Metrics(facts.name)
    created = int(time.time())

    # Authentication --------------------------------------------------------------------------------------------------------

    def user(request: Request) -> None:
        if access.api_key is not None and not any(_same(_bearer(request), key) for key in (access.api_key, access.admin_key)):
            raise unauthorized()

    def admin(request: Request) -> None:
        if access.admin_key is None and access.api_key is None:
            return
        if access.admin_key is None:
            raise APIError(403, "Adapters can't be changed: the server has no admin key", code="no_admin_key")
        if not _same(_bearer(request), access.admin_key):
            raise unauthorized()

    async def adapter_of(model: str) -> str | None:
        if model == facts.name:
            return None
        if not await backend.serves(model):
            raise unknown_model(model)
        return model

    # Models, generation, embeddings ----------------------------------------------------------------------------------------

    @app.get("/v1/models", dependencies=[Depends(user)])
    async def list_models() -> dict[str, Any]:
        adapters = await backend.adapters()
        return {"object": "list", "data": [_model(facts.name, created, facts.name)] + [_adapter(one) for one in adapters]}

    @app.get("/v1/models/{model:path}", dependencies=[Depends(user)])
    async def retrieve_model(model: str) -> dict[str, Any]:
        if model == facts.name:
            return _model(facts.name, created, facts.name)
        for one in await backend.adapters():
            if one.name == model:
                return _adapter(one)
        raise unknown_model(model)

    def _adapter(one: Any) -> dict[str, Any]:
        return {**_model(one.name, created, facts.name), "parent": facts.name, "version": one.version}

    @app.post("/v1/chat/completions", dependencies=[Depends(user)], response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _writes(facts.scores)
        adapter = await adapter_of(body.model)
        settings = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            settings.setdefault("enable_thinking", body.reasoning_effort != "none")
        tools = None if body.tool_choice == "none" else body.tools
        ids, syntax = prompts.chat(body.messages, tools, settings)
        forced = _forced_tools(body)
        if forced:
            grammar = forced_tool_grammar(forced)
        else:
            grammar = grammar_of(body.response_format, body.structured_outputs)
            strict = strict_tools_grammar(tools or (), syntax.tool_format)
            if grammar is not None and strict is not None:
                raise invalid("A strict tool and a format of the answer can't both be given: leave out one of them", "tools")
            grammar = grammar or strict
        sampling = sampling_of(
            body,
            limit=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar,
            prompt_tokens=len(ids),
            max_length=facts.max_length,
            vocabulary=len(prompts.tokenizer),
        )
        response = ChatResponse(body, prompts.tokenizer, syntax, forced=bool(forced), created=int(time.time()))
        return await respond(request, body, [ids], adapter, sampling, response)

    @app.post("/v1/completions", dependencies=[Depends(user)], response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _writes(facts.scores)
        adapter = await adapter_of(body.model)
        asked = [prompts.ids(one) if isinstance(one, str) else _known_ids(one, len(prompts.tokenizer)) for one in body.prompts]
        sampling = sampling_of(
            body,
            limit=body.max_tokens or 16,
            logprobs=body.logprobs,
            grammar=grammar_of(None, body.structured_outputs),
            prompt_tokens=max(map(len, asked)),
            max_length=facts.max_length,
            vocabulary=len(prompts.tokenizer),
        )
        response = CompletionResponse(body, prompts.tokenizer, created=int(time.time()), prompts=asked)
        return await respond(request, body, asked, adapter, sampling, response)

    @app.post("/v1/embeddings", dependencies=[Depends(user)], response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        _writes(facts.scores)
        adapter = await adapter_of(body.model)
        if body.dimensions not in (None, facts.hidden_size):
            raise invalid(f"dimensions must be {facts.hidden_size}, the model's hidden size", "dimensions")
        asked = [prompts.ids(one) if isinstance(one, str) else _known_ids(one, len(prompts.tokenizer)) for one in body.inputs]
        _fit(asked, facts.max_length)
        vectors = await backend.pooled(asked, body.pooling, adapter)
        as_asked = _as_base64 if body.encoding_format == "base64" else lambda vector: vector
        data = [{"object": "embedding", "index": n, "embedding": as_asked(vector)} for n, vector in enumerate(vectors)]
        usage = {"prompt_tokens": sum(map(len, asked)), "total_tokens": sum(map(len, asked))}
        return _json({"object": "list", "data": data, "model": body.model, "usage": usage}, body.ignored)

    @app.post("/v1/score", dependencies=[Depends(user)], response_model=None)
    async def score(body: ScoreRequest) -> Response:
        if not facts.scores:
            raise invalid("This is not a reward model, which /v1/score needs", "model")
        adapter = await adapter_of(body.model)
        if body.messages is not None:
            asked = [prompts.ids(prompts.chat_text(body.messages, None, {}, ends=True))]
        else:
            texts = [body.input] if isinstance(body.input, str) else body.input or []
            asked = [prompts.ids(text) for text in texts]
        _fit(asked, facts.max_length)
        values = await backend.pooled(asked, "score", adapter)
        data = [{"object": "score", "index": n, "score": value[0]} for n, value in enumerate(values)]
        usage = {"prompt_tokens": sum(map(len, asked)), "total_tokens": sum(map(len, asked))}
        return _json({"object": "list", "data": data, "model": body.model, "usage": usage}, body.ignored)

    @app.post("/tokenize", dependencies=[Depends(user)])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        await adapter_of(body.model)
        if body.messages is None:
            text = body.prompt or ""
        else:
            settings = body.chat_template_kwargs or {}
            text = prompts.chat_text(body.messages, body.tools, settings, ends=not body.add_generation_prompt)
        ids = prompts.ids(text)
        strings = [prompts.exact_text([id]) for id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": facts.max_length, "tokens": ids, "token_strs": strings, "prompt": text}

    @app.post("/detokenize", dependencies=[Depends(user)])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        await adapter_of(body.model)
        return {"prompt": prompts.exact_text(_known_ids(body.tokens, len(prompts.tokenizer)))}

    # Adapters -----------------------------------------------------------------------------------------------------------

    @app.post("/v1/load_lora_adapter", dependencies=[Depends(admin)])
    async def load_adapter(body: LoadAdapter) -> dict[str, Any]:
        name = checked_name(body.lora_name, facts.name)
        if await backend.serves(name) and not body.load_inplace:
            raise invalid(f"The adapter `{name}` is already loaded: set load_inplace to replace it", "lora_name")
        folder = checked_folder(body.lora_path, access.roots)
        version = await backend.add_adapter(name, str(folder), pinned=body.pinned)
        return {"status": "loaded", "name": name, "version": version}

    @app.post("/v1/unload_lora_adapter", dependencies=[Depends(admin)])
    async def unload_adapter(body: UnloadAdapter) -> dict[str, Any]:
        if not await backend.serves(body.lora_name):
            raise unknown_model(body.lora_name)
        await backend.remove_adapter(body.lora_name)
        return {"status": "unloaded", "name": body.lora_name}

    @app.get("/admin/adapters", dependencies=[Depends(admin)])
    async def list_adapters() -> dict[str, Any]:
        return {"adapters": [asdict(one) for one in await backend.adapters()]}

    @app.post("/admin/adapters/{name}/pin", dependencies=[Depends(admin)])
    async def pin_adapter(name: str, body: PinAdapter) -> dict[str, Any]:
        if not await backend.serves(name):
            raise unknown_model(name)
        await backend.pin(name, body.pinned)
        return {"name": name, "pinned": body.pinned}

    # Health ---------------------------------------------------------------------------------------------------------------

    @app.get("/health")
    async def health() -> dict[str, str]:
        stats = [report.stats for report in await backend.reports()]
        running, waiting = sum(one.running for one in stats), sum(one.waiting for one in stats)
        return {"status": "ok", "running": str(running), "waiting": str(waiting)}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        text = metrics.text(await backend.reports())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # Responses -------------------------------------------------------------------------------------------------------------

    async def respond(
        request: Request,
        body: ChatRequest | CompletionRequest,
        asked: Sequence[Sequence[int]],
        adapter: str | None,
        sampling: Sampling,
        response: ChatResponse | CompletionResponse,
    ) -> Response:
        began = time.monotonic()
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
        wanted = [
            EngineRequest(prompt_ids=ids, adapter=adapter, sampling=replace(sampling, seed=seed + n))
            for ids in asked
            for n in range(body.n or 1)
        ]
        merged = _merged([backend.stream(one) for one in wanted])
        first = await _before_disconnect(request, anext(merged))  # so that an error can still be an HTTP status
        seed_is_ignored = body.seed is not None and not facts.keeps_seeds
        headers = _headers(sorted([*body.ignored, "seed"]) if seed_is_ignored else body.ignored)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _events(first, merged, response, usage, _LatencyTimer(metrics, facts.name, began))
            return StreamingResponse(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        collected = Collected(len(wanted))
        timer = _LatencyTimer(metrics, facts.name, began)

        async def collect() -> None:
            async for index, delta in _with_first(first, merged):
                timer.observe(index, delta)
                collected.add(index, delta)

        await _before_disconnect(request, collect())
        return JSONResponse(response.full(collected), headers=headers)

    _install_errors(app, metrics, facts.name)
    app.add_middleware(BodySizeLimit, max_body_bytes=access.max_body_bytes)
    app.add_middleware(RequestId)
    return app


# Streams ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _LatencyTimer:
    """Records the latencies of one request in the metrics, separately for each of its answers, as in vLLM."""

    metrics: Metrics
    model: str
    began: float
    latest: dict[int, float] = field(default_factory=dict)
    """Choice index -> time of its last delta."""

    def observe(self, index: int, delta: Delta) -> None:
        now, before = time.monotonic(), self.latest.get(index)
        if before is None:
            self.metrics.first_token_s.labels(self.model).observe(now - self.began)
        else:
            self.metrics.between_tokens_s.labels(self.model).observe(now - before)
        self.latest[index] = now
        if delta.completion is not None:
            self.metrics.request_s.labels(self.model).observe(now - self.began)
            self.metrics.success.labels(self.model, delta.completion.finish).inc()


async def _merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """The items of all streams as they arrive, each with the index of its stream."""
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]


async def _with_first(first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for item in rest:
        yield item


async def _events(
    first: tuple[int, Delta],
    rest: AsyncIterator[tuple[int, Delta]],
    response: ChatResponse | CompletionResponse,
    include_usage: bool,
    timer: _LatencyTimer,
) -> AsyncIterator[str]:
    """Server-sent events. An error during the stream is sent as an event with an error object and ends the stream."""
    usage = Usage()
    try:
        async for index, delta in _with_first(first, rest):
            timer.observe(index, delta)
            usage.add(delta)
            for chunk in response.chunks(index, delta, usage=None if not include_usage else "later"):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        if include_usage:
            yield f"data: {json.dumps(response.usage_chunk(usage))}\n\n"
        yield "data: [DONE]\n\n"
    except UserError as error:
        yield f"data: {json.dumps(_api_error(error).body)}\n\n"
    except Exception as error:
        log.exception("a stream failed")
        yield f"data: {json.dumps(broken(f'The engine failed: {type(error).__name__}').body)}\n\n"
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def _before_disconnect(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client disconnects first, so that its rows are free at the next step."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "The client disconnected")
    finally:
        for one in (task, disconnected):
            one.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)


# Shared by the endpoints --------------------------------------------------------------------------------------------------


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


def _same(given: str, key: str | None) -> bool:
    """Compares in constant time, which reveals nothing about the key."""
    return key is not None and hmac.compare_digest(given.encode(), key.encode())


def _writes(scores: bool) -> None:
    if scores:
        raise invalid("This is a reward model, which can't generate: use /v1/score", "model")


def _forced_tools(body: ChatRequest) -> list[Any]:
    """The tools of which the answer must call one; empty: it need not call any."""
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in body.tools or () if tool.function.name == body.tool_choice.function.name]
    return list(body.tools or ()) if body.tool_choice == "required" else []


def _known_ids(ids: list[int], vocabulary: int) -> list[int]:
    if not all(0 <= id < vocabulary for id in ids):
        raise invalid(f"Token ids must be from 0 to {vocabulary - 1}", "prompt")
    return ids


def _fit(prompts: Sequence[Sequence[int]], max_length: int) -> None:
    for number, ids in enumerate(prompts):
        if not 0 < len(ids) <= max_length:
            raise invalid(
                f"Input {number} has {len(ids)} tokens; this model takes 1 to {max_length}", "input", "context_length_exceeded"
            )


def _as_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _headers(ignored: Sequence[str]) -> dict[str, str]:
    return {"x-ignored-fields": ", ".join(ignored)} if ignored else {}


def _json(body: dict[str, Any], ignored: Sequence[str]) -> JSONResponse:
    return JSONResponse(body, headers=_headers(ignored))


def _model(name: str, created: int, root: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "raytune_llm", "root": root}


def _api_error(error: UserError) -> APIError:
    if isinstance(error, Overloaded):
        return overloaded(RETRY_AFTER_S)
    if isinstance(error, ResourceError):
        return broken(str(error))
    return invalid(str(error))


def _install_errors(app: FastAPI, metrics: Metrics, model: str) -> None:
    @app.exception_handler(APIError)
    async def of_api(request: Request, error: APIError) -> Response:
        metrics.refused.labels(model, str(error.status)).inc()
        return error.response()

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> Response:
        return await of_api(request, _api_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("function-"))
        return await of_api(request, invalid(f"{place + ': ' if place else ''}{first['msg']}", place or None))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return await of_api(request, APIError(error.status_code, str(error.detail), code=kind, headers=error.headers))

    @app.exception_handler(Exception)
    async def of_ours(request: Request, error: Exception) -> Response:
        log.exception("a request failed")
        return APIError(500, "The server failed to answer; its log says why", type="server_error").response()
