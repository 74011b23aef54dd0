"""The server's log: a line a request, on standard error."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("raytune_llm.serve")


def log_at(level: str) -> None:
    """From this level on. Other libraries keep theirs."""
    if not LOGGER.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.propagate = False
    LOGGER.setLevel(level.upper())
