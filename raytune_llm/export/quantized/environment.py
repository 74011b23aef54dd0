"""Running llmcompressor in a separate environment, since it pins another version of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raytune_llm.config.resources import ResourcesConfig, uses_ray
from raytune_llm.errors import ConfigError, ResourceError, first_line

PACKAGE, REQUIREMENT = "llmcompressor", "llmcompressor>=0.14,<0.15"
PROGRAM = Path(__file__).with_name("llmcompressor_job.py")
ENVIRONMENT = f"python -m venv quantizer && quantizer/bin/pip install '{REQUIREMENT}'"
ASK = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PACKAGE!r}) is None)"


def check_environment(format: str, python: str | None, resources: ResourcesConfig) -> None:
    """Raises ConfigError if llmcompressor can't be started. With resources=local or cluster and no export.python, Ray installs
    it."""
    if python is None:
        if not uses_ray(resources) and find_spec(PACKAGE) is None:
            rule = f"can't be {format} here: {PACKAGE} is not installed"
            fix = f"Make an environment for it ({ENVIRONMENT}) and set export.python=quantizer/bin/python."
            raise ConfigError("export.format", rule, got=format, fix=fix)
        return
    if uses_ray(resources):
        return  # a file on the nodes, which can't be checked here
    try:
        asked = subprocess.run([python, "-P", "-c", ASK], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        rule = f"must be a Python that can be started ({first_line(error)})"
        raise ConfigError("export.python", rule, got=python, fix=ENVIRONMENT) from None
    if asked.returncode != 0:
        rule = f"must be the Python (3.11 or newer) of an environment with {PACKAGE}"
        raise ConfigError("export.python", rule, got=python, fix=f"For example: {ENVIRONMENT}.")


def quantize(job: Mapping[str, Any], python: str | None, resources: ResourcesConfig) -> None:
    """Run the program, here or as a Ray task. The task's node must have access to the job's folders."""
    work = partial(_run, dict(job), python)
    if not uses_ray(resources):
        return work()
    from raytune_llm.runs.remote_task import call_on_node
    from raytune_llm.session import connect

    connect(resources)
    return call_on_node(resources, work, packages=() if python is not None else (REQUIREMENT,))


def _run(job: Mapping[str, Any], python: str | None) -> None:
    """Run the program here. Raises ResourceError with its last line if it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [python or sys.executable, "-P", str(PROGRAM), file.name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)  # it belongs to this environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise ResourceError(f"{PACKAGE} failed: {words[0].strip()}", "Set export.format=w4a16, which needs no calibration.")
    if not Path(job["output"]).is_dir():
        rule = f"must be the Python of an environment with {PACKAGE}: it ended without a model"
        raise ConfigError("export.python", rule, got=python, fix=ENVIRONMENT)
