"""S3 as moto plays it, in this process, and the faults of a server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest

REFUSALS = {"SlowDown": "503 Slow Down", "InternalError": "500 Internal Server Error", "ExpiredToken": "400 Bad Request"}


class Faulty:
    """A WSGI application whose answers to requests of a method fail, once for each of `faults`: a code of REFUSALS, "reset" (the
    connection ends before the request is read), "lost" (after it was carried out) or "cut" (half of the answer comes)."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.faults: dict[str, list[str]] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        waiting = self.faults.get(environ["REQUEST_METHOD"])
        if not waiting:
            return self._app(environ, start)
        fault = waiting.pop(0)
        if fault in REFUSALS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{fault}</Code><Message>The server says {fault}.</Message></Error>".encode()
            start(REFUSALS[fault], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer: list[Any] = []
        body = b"" if fault == "reset" else b"".join(self._app(environ, lambda *given, **_: answer.extend(given)))
        status, headers = answer[:2] if fault == "cut" else ("200 OK", [])
        start(status, headers)
        return self._ended_early(environ["werkzeug.socket"], body[: len(body) // 2] if fault == "cut" else b"")

    def _ended_early(self, connection: socket.socket, part: bytes) -> Iterator[bytes]:
        if part:
            yield part
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_bucket(name: str, *, faulty: Callable[[Faulty], None] = lambda server: None) -> Iterator[str]:
    """The address of a new bucket. The environment names its server meanwhile. faulty: is given what makes the server fail."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    server._server.app = fails = Faulty(server._server.app)
    faulty(fails)
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    settings["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in settings.items():
            patch.setenv(setting, value)
        # moto keeps its buckets for as long as the process lives, whatever the server
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps a client, and with it the server of an earlier test
        fsspec.filesystem("s3").mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
