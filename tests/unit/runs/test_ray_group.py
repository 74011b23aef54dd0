"""What happens to a group where looking at its cluster fails."""

from __future__ import annotations

import threading

import pytest
from ray.exceptions import RaySystemError

from raytune_llm.runs import ray_group


def test_a_cluster_that_does_not_answer_is_looked_at_again_and_an_error_of_ours_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(ray_group, "POLL_S", 0.0)
    failures: list[Exception] = [RaySystemError("away"), RaySystemError("away"), KeyError("a node")]

    def look() -> None:
        raise failures.pop(0)

    ray_group._watch(look, threading.Event())
    assert not failures
    [record] = caplog.records
    assert "no longer watched" in record.message and record.exc_info is not None and record.exc_info[0] is KeyError
