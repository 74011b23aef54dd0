"""The cases that are kept here are those of the full sets."""

from __future__ import annotations

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
