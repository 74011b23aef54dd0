"""Errors in the format of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from raytune_llm.errors import ResourceError, UserError
from raytune_llm.serve.backend import RETRY_AFTER_S, Overloaded


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request can't be answered"},
    "5XX": {"model": ErrorBody, "description": "The server or its engine failed"},
}
"""What the API's description says of errors."""


class APIError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message = message.encode(errors="backslashreplace").decode()  # it may quote a text that is no Unicode
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def unknown_model(model: str) -> APIError:
    return APIError(404, f"The model `{model}` does not exist", param="model", code="model_not_found")


def unauthorized() -> APIError:
    message = "Incorrect API key provided"
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def overloaded(retry_after_s: float) -> APIError:
    return APIError(
        429,
        "The server is at its limit of requests; try again later",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )


def broken(message: str) -> APIError:
    return APIError(503, message, type="server_error", code="engine_unavailable")


def api_error(error: UserError) -> APIError:
    """The response to an error of the engine or the backend."""
    if isinstance(error, Overloaded):
        return overloaded(RETRY_AFTER_S)
    if isinstance(error, ResourceError):
        return broken(str(error))
    return invalid(str(error))
