"""A config as a value of an environment variable: compressed, in letters that every shell passes on."""

from __future__ import annotations

import base64
import gzip
import os
import zlib

from raytune_llm.errors import ConfigError


def pack(settings: str) -> str:
    """The same settings always give the same text."""
    return base64.b64encode(gzip.compress(settings.encode(), mtime=0)).decode()


def unpack(variable: str) -> str:
    """The settings in an environment variable. Raises ConfigError if it has none."""
    try:
        settings = gzip.decompress(base64.b64decode(os.environ.get(variable, ""), validate=True)).decode()
    except (ValueError, OSError, EOFError, zlib.error):
        settings = ""
    if not settings:
        raise ConfigError("--config-env", "must name an environment variable with a packed config", got=variable)
    return settings
