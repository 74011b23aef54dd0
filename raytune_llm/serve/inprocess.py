"""One process, one engine, one port: `serve` with resources=inline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import uvicorn

from raytune_llm.config.run import ServeRun
from raytune_llm.serve.access import access_of
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.backend import InProcess
from raytune_llm.serve.engines import build_engine, tokenizer_of
from raytune_llm.serve.logs import log_at
from raytune_llm.serve.port import bound
from raytune_llm.serve.prompts import Prompts
from raytune_llm.serve.watch import Watcher


def serve_inline(run: ServeRun, *, told: Callable[[str], None]) -> None:
    """Until Ctrl-C or SIGTERM, which it raises (KeyboardInterrupt, Terminated) when it has drained. The port is taken before the
    model is loaded, which takes long."""
    serve = run.serve
    listening = bound(serve.host, serve.port)
    url = f"http://{serve.host}:{listening.getsockname()[1]}"
    told(f"loading {run.model.path or 'a model'}")
    tokenizer, _ = tokenizer_of(run.model, serve)
    engine, facts = build_engine(run.model, run.quantization, run.engine, serve)
    watcher = None
    try:
        if serve.watch is not None:
            watcher = Watcher(Path(serve.watch).resolve(), engine, base_name=facts.name, told=told)
            watcher.start()
        log_at(serve.log_level)
        app = build_app(InProcess(engine, facts, max_waiting=serve.max_waiting), Prompts(tokenizer), access_of(run))
        settings = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=serve.drain_s)
        server = uvicorn.Server(settings)
        told(f"models: {', '.join([facts.name, *(one.name for one in engine.adapters())])}")
        told(f"ready at {url}")
        try:
            server.run(sockets=[listening])
        finally:
            told("stopped")
    finally:
        if watcher is not None:
            watcher.stop()
        engine.close()
        listening.close()
