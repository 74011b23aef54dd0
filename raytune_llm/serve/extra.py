"""The packages of the extra `serve`, which not every installation has."""

from __future__ import annotations

from importlib.util import find_spec

from raytune_llm.errors import ResourceError

MODULES = ("fastapi", "uvicorn", "prometheus_client")


def check_extra(verb: str) -> None:
    """Raises ResourceError if the API's server can't run in this environment."""
    missing = [module for module in MODULES if find_spec(module) is None]
    if missing:
        raise ResourceError(f"{verb} needs {', '.join(missing)}", "Install it: pip install 'raytune-llm[serve]'.")
