"""A server in this process and its client, over a Unix socket in a folder that only this user can open."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from raytune_llm.chat.client import Client
from raytune_llm.config.run import ChatRun
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.api.server import Access
from raytune_llm.serve.backend import InProcessBackend
from raytune_llm.serve.engines import build_engine, check_names, tokenizer_of
from raytune_llm.serve.prompts import Prompts

MAX_BODY_BYTES = 64 * 2**20
MAX_WAITING = 1024


@contextmanager
def client_here(run: ChatRun) -> Iterator[Client]:
    """A client of a server that has the model and adapters of chat's settings. Both end with the context."""
    check_names(run.model, run.chat)
    tokenizer, _ = tokenizer_of(run.model, run.chat)
    engine, facts = build_engine(run.model, run.quantization, run.engine, run.chat)
    try:
        access = Access(api_key=None, admin_key=None, roots=[], max_body_bytes=MAX_BODY_BYTES)
        app = build_app(InProcessBackend(engine, facts, max_waiting=MAX_WAITING), Prompts(tokenizer), access)
        with tempfile.TemporaryDirectory(prefix="raytune-llm-") as folder:
            socket = str(Path(folder) / "api")
            server = uvicorn.Server(uvicorn.Config(app, uds=socket, log_level="warning", lifespan="off"))
            thread = threading.Thread(target=server.run, name="api", daemon=True)
            thread.start()
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            http = httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://this-process", timeout=None)
            try:
                yield Client(http)
            finally:
                http.close()
                server.should_exit = server.force_exit = True
                thread.join()
    finally:
        engine.close()
