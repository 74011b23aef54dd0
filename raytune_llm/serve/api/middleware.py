"""ASGI middleware: the maximum size of a request body, and request ids in headers and log."""

from __future__ import annotations

import logging
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llm.serve.api.errors import APIError
from raytune_llm.serve.api.schema import is_number

log = logging.getLogger("raytune_llm.serve")


class BodySizeLimit:
    """Rejects bodies of more than `max_body_bytes` with status 413, with or without a content-length header."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not is_number(length) or int(length) > self._max:
            await self._refusal().response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= self._max else {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            if received <= self._max:
                await send(message)

        await self._app(scope, counted, unless_refused)
        if received > self._max:
            await self._refusal().response()(scope, receive, send)

    def _refusal(self) -> APIError:
        return APIError(413, f"The body may have at most {self._max} bytes", code="body_too_large")


class RequestId:
    """Gives each request an id, from its header x-request-id or a new one. The id is in the response header and in the log.
    What fails without an answer is answered here, with the id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        fits = given.isascii() and given.isprintable() and 0 < len(given) <= 128
        name, began, status = given if fits else f"req-{secrets.token_hex(8)}", time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("%s failed", name)
            if not status:
                await APIError(500, "The server failed to answer; its log says why", type="server_error").response()(
                    scope, receive, named
                )
        finally:
            path = quote(scope["path"])  # a line break in it would begin a line of its own
            log.info("%s %s %s %d %.0f ms", name, scope["method"], path, status, 1000 * (time.monotonic() - began))
