"""One process, one engine, one port: `serve` with resources=inline."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from raytune_llm.config.run import ADMIN_KEY, API_KEY, ServeRun
from raytune_llm.errors import ResourceError
from raytune_llm.serve.api.app import Access, build_app
from raytune_llm.serve.backend import InProcess
from raytune_llm.serve.engines import base_name, build_engine, tokenizer_of
from raytune_llm.serve.prompts import Prompts
from raytune_llm.serve.watch import Watcher

DRAIN_S = 30
"""Answers that are being made have so long to end when the server is stopped."""


def access_of(run: ServeRun) -> Access:
    serve = run.serve
    roots = [Path(folder) for folder in (*serve.adapter_roots, *serve.adapters.values(), *filter(None, [serve.watch]))]
    return Access(
        api_key=serve.api_key or os.environ.get(API_KEY) or None,
        admin_key=serve.admin_key or os.environ.get(ADMIN_KEY) or None,
        roots=roots,
        max_waiting=serve.max_waiting,
        max_body_bytes=serve.max_body_bytes,
    )


def serve_inline(run: ServeRun, *, told: Callable[[str], None]) -> None:
    """Until it is interrupted. The port is taken before the model is loaded, which takes long."""
    serve = run.serve
    listening = _bound(serve.host, serve.port)
    url = f"http://{serve.host}:{listening.getsockname()[1]}"
    told(f"loading {run.model.path or 'a model'}")
    tokenizer, _ = tokenizer_of(run.model, serve)
    engine, facts = build_engine(run.model, run.quantization, run.engine, serve)
    watcher = None
    try:
        if serve.watch is not None:
            watcher = Watcher(Path(serve.watch).resolve(), engine, base_name=base_name(run.model, serve), told=told)
            watcher.start()
        logging.getLogger("raytune_llm.serve").setLevel(serve.log_level.upper())
        app = build_app(InProcess(engine, facts), Prompts(tokenizer), access_of(run))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=DRAIN_S))
        told(f"models: {', '.join([facts.name, *(one.name for one in engine.adapters())])}")
        told(f"ready at {url}")
        with suppress(KeyboardInterrupt):  # it drained by then
            server.run(sockets=[listening])
        told("stopped")
    finally:
        if watcher is not None:
            watcher.stop()
        engine.close()
        listening.close()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ResourceError(
            f"serve.host={host} serve.port={port} can't be listened at ({error.strerror})",
            "Take another port, or 0 for a free one.",
        ) from None
    listening.listen(512)
    return listening
