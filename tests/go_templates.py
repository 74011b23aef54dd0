"""Go's own text/template in Ollama's place, where Go is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")


@dataclass(frozen=True)
class Rendered:
    texts: list[str]
    call: str
    """What Ollama would look for as the beginning of a call; empty: a brace."""
    thought: tuple[str, str]
    """What it would look for around a thought."""


def render(jobs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[Rendered]:
    """Templates, each with the values of its prompts."""
    asked = json.dumps([{"template": template, "prompts": list(prompts)} for template, prompts in jobs])
    answered = subprocess.run([_program()], input=asked, capture_output=True, text=True, check=True).stdout
    return [Rendered(found["texts"], found["call"], tuple(found["thought"])) for found in json.loads(answered)]


@cache
def _program() -> Path:
    folder = Path(mkdtemp())
    settings = {"GO111MODULE": "off", "GOCACHE": str(folder / "cache"), "GOTOOLCHAIN": "local"}
    source = Path(__file__).with_name("ollama") / "render.go"
    subprocess.run(["go", "build", "-o", folder / "render", source], check=True, env={**os.environ, **settings})
    return folder / "render"
