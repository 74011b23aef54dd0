"""What all endpoints of the API share: the server's backend and prompts, authentication, and the checks of inputs."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from raytune_llm.serve.api.errors import APIError, invalid, unauthorized, unknown_model
from raytune_llm.serve.api.metrics import Metrics
from raytune_llm.serve.backend import Backend
from raytune_llm.serve.prompts import Prompts

Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
"""The key in the header `Authorization: Bearer KEY`."""


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


@dataclass(frozen=True, kw_only=True)
class Server:
    """The parts that endpoints use."""

    backend: Backend
    prompts: Prompts
    access: Access
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    """Start of the server, in seconds since 1970."""

    def user(self, bearer: Bearer) -> None:
        """Raises APIError unless the request has an API key, where one is required."""
        keys = (self.access.api_key, self.access.admin_key)
        if self.access.api_key is not None and not any(_same(bearer, key) for key in keys):
            raise unauthorized()

    def admin(self, bearer: Bearer) -> None:
        """Raises APIError unless the request may change adapters."""
        access = self.access
        if access.admin_key is None and access.api_key is None:
            return
        if access.admin_key is None:
            raise APIError(403, "Adapters can't be changed: the server has no admin key", code="no_admin_key")
        if not _same(bearer, access.admin_key):
            raise unauthorized()

    async def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's `model` names. None: the base model. Raises APIError for an unknown one."""
        if model == self.backend.facts.name:
            return None
        if not await self.backend.serves(model):
            raise unknown_model(model)
        return model

    def check_generates(self) -> None:
        """Raises APIError for a reward model."""
        if self.backend.facts.scores:
            raise invalid("This is a reward model, which can't generate: use /v1/score", "model")

    async def ids_of(self, prompts: Sequence[str | list[int]], field: str) -> list[list[int]]:
        """Token ids of prompts that are plain texts or token ids. Raises APIError, which names the field, for ids that the model
        does not have."""
        return [await self.prompts.plain_ids(one) if isinstance(one, str) else self.known_ids(one, field) for one in prompts]

    def known_ids(self, ids: list[int], field: str) -> list[int]:
        vocabulary = len(self.prompts.tokenizer)
        if min(ids, default=0) < 0 or max(ids, default=0) >= vocabulary:
            raise invalid(f"Token ids must be from 0 to {vocabulary - 1}", field)
        return ids

    def check_fits(self, inputs: Sequence[Sequence[int]]) -> None:
        """Raises APIError for an input that is empty or longer than the model takes."""
        max_length = self.backend.facts.max_length
        for number, ids in enumerate(inputs):
            if not 0 < len(ids) <= max_length:
                what = f"Input {number} has {len(ids)} tokens; this model's maximum context length is {max_length} tokens"
                raise invalid(what, "input", "context_length_exceeded")


def headers_of(ignored: Sequence[str]) -> dict[str, str]:
    """Headers of a response. ignored: fields of the request that had no effect."""
    return {"x-ignored-fields": ", ".join(ignored)} if ignored else {}


def json_response(body: dict[str, Any], ignored: Sequence[str]) -> JSONResponse:
    return JSONResponse(body, headers=headers_of(ignored))


def _same(bearer: HTTPAuthorizationCredentials | None, key: str | None) -> bool:
    """Compares in constant time, which reveals nothing about the key. Headers are bytes, which Starlette reads as Latin-1."""
    given = b"" if bearer is None else bearer.credentials.encode("latin-1")
    return key is not None and hmac.compare_digest(given, key.encode())
