"""Who may ask a server for what: its settings and its environment's keys."""

from __future__ import annotations

import os
from pathlib import Path

from raytune_llm.config.run import ADMIN_KEY, API_KEY, ServeRun
from raytune_llm.serve.api.app import Access


def access_of(run: ServeRun) -> Access:
    serve = run.serve
    roots = [Path(folder) for folder in (*serve.adapter_roots, *serve.adapters.values(), *filter(None, [serve.watch]))]
    return Access(
        api_key=serve.api_key or os.environ.get(API_KEY) or None,
        admin_key=serve.admin_key or os.environ.get(ADMIN_KEY) or None,
        roots=roots,
        max_body_bytes=serve.max_body_bytes,
    )
