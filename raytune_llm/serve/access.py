"""Access control of a server: API keys from its settings or environment, and the folders adapters may be loaded from."""

from __future__ import annotations

import os
from pathlib import Path

from raytune_llm.config.run import ADMIN_KEY, API_KEY, ServeRun
from raytune_llm.serve.api.server import Access


def access_of(run: ServeRun) -> Access:
    """Keys in the settings take precedence over RAYTUNE_LLM_API_KEY and RAYTUNE_LLM_ADMIN_KEY."""
    serve = run.serve
    roots = [Path(folder) for folder in (*serve.adapter_roots, *serve.adapters.values(), *filter(None, [serve.watch]))]
    return Access(
        api_key=serve.api_key or os.environ.get(API_KEY) or None,
        admin_key=serve.admin_key or os.environ.get(ADMIN_KEY) or None,
        roots=roots,
        max_body_bytes=serve.max_body_bytes,
    )
