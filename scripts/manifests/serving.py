"""A RayService's Serve config, against Ray Serve's own schema."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

Object = dict[str, Any]


def check_serve_config(found: Object) -> list[str]:
    """What Ray Serve would refuse. Nothing of other kinds."""
    if found["kind"] != "RayService":
        return []
    from ray.serve.schema import ServeDeploySchema  # a second to import

    try:
        ServeDeploySchema.model_validate(yaml.safe_load(found["spec"]["serveConfigV2"]) or {})
    except ValidationError as error:
        return [f"serveConfigV2: {problem['loc']}: {problem['msg']}" for problem in error.errors()]
    return []
