"""Around every request: how large a body may be, and a name for the log."""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytune_llm.serve.api.errors import APIError

log = logging.getLogger("raytune_llm.serve")


class Limits:
    """Bodies of more than `max_body_bytes` are refused, also where the client doesn't say how long they are."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "0")
        if not said.isdigit() or int(said) > self._max:
            await self._refusal().response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self._max else {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            if taken <= self._max:
                await send(message)

        await self._app(scope, counted, unless_refused)
        if taken > self._max:
            await self._refusal().response()(scope, receive, send)

    def _refusal(self) -> APIError:
        return APIError(413, f"The body may have at most {self._max} bytes", code="body_too_large")


class Named:
    """Each request has an id: its own x-request-id, or a new one. It comes back and stands in the log."""

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
        finally:
            log.info("%s %s %s %d %.0f ms", name, scope["method"], scope["path"], status, 1000 * (time.monotonic() - began))
