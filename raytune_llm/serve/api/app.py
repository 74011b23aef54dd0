"""The OpenAI-compatible HTTP API as a FastAPI application over a Backend."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from raytune_llm.errors import UserError
from raytune_llm.serve.api.errors import RESPONSES, APIError, api_error, broken, invalid
from raytune_llm.serve.api.generation import Generation
from raytune_llm.serve.api.inputs import Inputs
from raytune_llm.serve.api.metrics import Metrics
from raytune_llm.serve.api.middleware import BodySizeLimit, RequestId
from raytune_llm.serve.api.models import Models
from raytune_llm.serve.api.server import Access, Server
from raytune_llm.serve.backend import Backend
from raytune_llm.serve.prompts import Prompts

FIELD = re.compile(r"(?!(str|int|float|bool)$)[a-z_][a-z0-9_]*|[0-9]+")
"""Parts of a place in a body, but not the names of types by which pydantic tells a union's forms apart."""


def build_app(backend: Backend, prompts: Prompts, access: Access) -> FastAPI:
    """The application with all endpoints, error responses and request limits."""
    app = FastAPI(title="raytune_llm", version="1", docs_url="/docs", redoc_url=None)
    metrics = Metrics(backend.facts.name)
    server = Server(backend=backend, prompts=prompts, access=access, metrics=metrics)
    for endpoints in (Models(server), Generation(server), Inputs(server), Health(server)):
        app.include_router(endpoints.routes(), responses=RESPONSES)
    _install_errors(app, metrics, backend.facts.name)
    app.add_middleware(BodySizeLimit, max_body_bytes=access.max_body_bytes)
    app.add_middleware(RequestId)
    return app


@dataclass(frozen=True)
class Health:
    """The endpoints for monitoring, which need no key."""

    server: Server

    def routes(self) -> APIRouter:
        router = APIRouter()
        router.get("/health")(self.health)
        router.get("/metrics", response_class=PlainTextResponse)(self.show_metrics)
        return router

    async def health(self) -> dict[str, str]:
        """Raises APIError (503) if no engine runs."""
        reports = await self.server.backend.reports()
        if all(report.failure is not None for report in reports):
            raise broken(f"The engine has failed: {', '.join(str(report.failure) for report in reports) or 'there is none'}")
        stats = [report.stats for report in reports]
        running, waiting = sum(one.running for one in stats), sum(one.waiting for one in stats)
        return {"status": "ok", "running": str(running), "waiting": str(waiting)}

    async def show_metrics(self) -> Response:
        text = self.server.metrics.text(await self.server.backend.reports())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _install_errors(app: FastAPI, metrics: Metrics, model: str) -> None:
    @app.exception_handler(APIError)
    async def of_api(request: Request, error: APIError) -> Response:
        metrics.refused.labels(model, str(error.status)).inc()
        return error.response()

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> Response:
        return await of_api(request, api_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        if not _is_json(request.headers.get("content-type", "")):
            return await of_api(request, invalid("The header content-type must be application/json"))
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's, that of the form which fits best
        if first["type"] == "json_invalid":
            return await of_api(request, invalid("The body must be JSON"))
        place = ".".join(str(part) for part in first["loc"][1:] if FIELD.fullmatch(str(part)))
        message = first["msg"].removeprefix("Value error, ")
        return await of_api(request, invalid(f"{place + ': ' if place else ''}{message}", place or None))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return await of_api(request, APIError(error.status_code, str(error.detail), code=kind, headers=error.headers))


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
