"""The server's log on standard error, with one line per request."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("raytune_llm.serve")


def log_at(level: str) -> None:
    """Log messages of `level` and above. The loggers of other libraries are not changed."""
    if not LOGGER.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.propagate = False
    LOGGER.setLevel(level.upper())
