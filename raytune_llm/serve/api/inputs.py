"""The endpoints that compute something of given texts: embeddings, scores of a reward model, and tokens."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from raytune_llm.serve.api.errors import invalid
from raytune_llm.serve.api.schema import DetokenizeRequest, EmbeddingRequest, ScoreRequest, TokenizeRequest
from raytune_llm.serve.api.server import Server, json_response
from raytune_llm.serve.api.streams import before_disconnect


@dataclass(frozen=True)
class Inputs:
    server: Server

    def routes(self) -> APIRouter:
        router = APIRouter(dependencies=[Depends(self.server.user)])
        router.post("/v1/embeddings", response_model=None)(self.embeddings)
        router.post("/v1/score", response_model=None)(self.score)
        router.post("/tokenize", response_model=None)(self.tokenize)
        router.post("/detokenize", response_model=None)(self.detokenize)
        return router

    async def embeddings(self, body: EmbeddingRequest, request: Request) -> Response:
        self.server.check_generates()
        adapter = await self.server.adapter_of(body.model)
        hidden_size = self.server.backend.facts.hidden_size
        if body.dimensions not in (None, hidden_size):
            raise invalid(f"dimensions must be {hidden_size}, the model's hidden size", "dimensions")
        inputs = await self.server.ids_of(body.inputs, "input")
        self.server.check_fits(inputs)
        vectors = await before_disconnect(request, self.server.backend.pooled(inputs, body.pooling, adapter))
        encoded = _as_base64 if body.encoding_format == "base64" else lambda vector: vector
        data = [{"object": "embedding", "index": n, "embedding": encoded(vector)} for n, vector in enumerate(vectors)]
        return json_response(_listed(data, body.model, inputs), body.ignored)

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        if not self.server.backend.facts.scores:
            raise invalid("This is not a reward model, which /v1/score needs", "model")
        adapter = await self.server.adapter_of(body.model)
        if body.messages is not None:
            inputs = [await self.server.prompts.ids(self.server.prompts.chat_text(body.messages, None, {}, ends=True))]
        else:
            inputs = await self.server.ids_of([body.input] if isinstance(body.input, str) else body.input or [], "input")
        self.server.check_fits(inputs)
        values = await before_disconnect(request, self.server.backend.pooled(inputs, "score", adapter))
        data = [{"object": "score", "index": n, "score": value[0]} for n, value in enumerate(values)]
        return json_response(_listed(data, body.model, inputs), body.ignored)

    async def tokenize(self, body: TokenizeRequest) -> Response:
        await self.server.adapter_of(body.model)
        prompts = self.server.prompts
        if body.messages is None:
            text = body.prompt or ""
        else:
            settings = body.chat_template_kwargs or {}
            text = prompts.chat_text(body.messages, body.tools, settings, ends=not body.add_generation_prompt)
        unmarked = await prompts.ids(text)
        adds_start = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
        ids = await prompts.plain_ids(text) if adds_start else unmarked
        text = prompts.exact_text(ids[: len(ids) - len(unmarked)]) + text
        strings = [prompts.token_bytes.text(id) for id in ids] if body.return_token_strs else None
        max_length = self.server.backend.facts.max_length
        tokenized = {"count": len(ids), "max_model_len": max_length, "tokens": ids, "token_strs": strings, "prompt": text}
        return json_response(tokenized, body.ignored)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        await self.server.adapter_of(body.model)
        ids = self.server.known_ids(body.tokens, "tokens")
        return json_response({"prompt": self.server.prompts.exact_text(ids)}, body.ignored)


def _listed(data: Sequence[Any], model: str, inputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    tokens = sum(map(len, inputs))
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _as_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
