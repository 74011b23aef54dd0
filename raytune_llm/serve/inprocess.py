"""`serve` with resources=inline: one engine and the HTTP server in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import uvicorn

from raytune_llm.config.run import ServeRun
from raytune_llm.serve.access import access_of
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.backend import InProcessBackend, warm_up
from raytune_llm.serve.engines import build_engine, check_names, other_bases, tokenizer_of
from raytune_llm.serve.logs import log_at
from raytune_llm.serve.port import bound, url_of
from raytune_llm.serve.prompts import Prompts
from raytune_llm.serve.watch import Watcher


def serve_inline(run: ServeRun, *, notify: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain and raise KeyboardInterrupt or Terminated.

    The port is opened before the model is loaded, so that a port in use is reported at once. notify: called with one line of text
    at each stage.
    """
    serve = run.serve
    check_names(run.model, serve)
    listening = bound(serve.host, serve.port)
    url = url_of(serve.host, listening.getsockname()[1])
    notify(f"loading {run.model.path or 'a model'}")
    tokenizer, _ = tokenizer_of(run.model, serve)
    engine, facts = build_engine(run.model, run.quantization, run.engine, serve)
    watcher = None
    try:
        if not facts.scores:
            warm_up(engine)
        if serve.watch is not None:
            folder = Path(serve.watch).resolve()
            watcher = Watcher(folder, engine, base_name=facts.name, adapters=serve.adapters, notify=notify)
            watcher.start()
        log_at(serve.log_level)
        app = build_app(InProcessBackend(engine, facts, max_waiting=serve.max_waiting), Prompts(tokenizer), access_of(run))
        settings = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=serve.drain_s)
        server = uvicorn.Server(settings)
        notify(f"models: {', '.join([facts.name, *(one.name for one in engine.adapters())])}")
        for line in other_bases(run.model, serve):
            notify(line)
        notify(f"ready at {url}")
        try:
            server.run(sockets=[listening])
        finally:
            notify("stopped")
    finally:
        if watcher is not None:
            watcher.stop()
        engine.close()
        listening.close()
