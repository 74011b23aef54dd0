"""The cases that are kept here are those of the full sets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.cut_fixtures import cut
from tests.parity.sets import FULL, KEPT


@pytest.mark.skipif(not FULL.is_dir(), reason="the full sets are not beside this checkout")
def test_fixtures_are_cut_from_the_full_sets(tmp_path: Path) -> None:
    cut(FULL, tmp_path)
    ours, cuts = ({file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")} for root in (KEPT, tmp_path))
    ours.pop(Path("README.md"))
    assert ours == cuts


@pytest.mark.long
def test_every_test_here_has_cases_where_the_full_sets_are_not(tmp_path: Path) -> None:
    """A parameter set without any is an error as pytest collects, and ends the whole run."""
    root = Path(__file__).parents[2]
    clone = tmp_path / "folder" / "clone"
    shutil.copytree(root / "tests", clone / "tests", ignore=shutil.ignore_patterns("__pycache__", "recorded", "gpu", "ray"))
    shutil.copy(root / "pyproject.toml", clone)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/parity"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout[-2000:]
