"""A file system that is away for a moment, or for good."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_llm import storage
from raytune_llm.errors import ResourceError
from raytune_llm.storage import PAUSES_S, away_in, no_access_in, patiently


def failing(*errors: BaseException) -> Callable[[], str]:
    """Raises one error after another, and then returns."""
    left = list(errors)

    def does() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return does


def said(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,) * len(PAUSES_S))


def test_it_is_waited_for_and_no_longer_than_two_minutes():
    assert sum(PAUSES_S) == 120
    away = [said(errno.EIO), said(errno.ESTALE), said(errno.ETIMEDOUT)]
    assert patiently("x can't be written", failing(*away)) == "done"
    with pytest.raises(OSError, match="Stale"):
        patiently("x can't be written", failing(*[said(errno.ESTALE)] * (len(PAUSES_S) + 1)))


@pytest.mark.parametrize(
    "error",
    [said(errno.ENOSPC), said(errno.ENOENT), ValueError("x"), KeyboardInterrupt(), ResourceError("the store is away", "wait")],
)
def test_another_error_is_raised_at_once(error: BaseException):
    with pytest.raises(type(error)):
        patiently("x can't be written", failing(error))


def test_what_was_said_is_found_in_the_chain_of_errors_and_those_of_other_workers():
    chained = RuntimeError("inline_container: failed writing file")
    chained.__context__ = said(errno.EIO)
    assert away_in(chained) == "Input/output error"
    gathered = RuntimeError("CheckpointException")
    gathered.failures = {1: (said(errno.ESTALE), None)}  # type: ignore[attr-defined]
    assert away_in(gathered) == os.strerror(errno.ESTALE)
    gathered.failures[0] = (KeyboardInterrupt(), None)  # type: ignore[attr-defined]
    assert away_in(gathered) is None


def test_only_a_folder_of_the_run_itself_is_one_that_it_can_no_longer_write_to(tmp_path: Path):
    def of(code: int, path: Path | None) -> str | None:
        return no_access_in(OSError(code, os.strerror(code), path and str(path)), tmp_path)

    assert of(errno.EROFS, None) == "Read-only file system"
    assert of(errno.EACCES, tmp_path / "metrics.jsonl") == f"{tmp_path / 'metrics.jsonl'}: Permission denied"
    assert of(errno.ENOENT, tmp_path / "step-2" / "state") == f"{tmp_path / 'step-2'} was removed"
    assert of(errno.ENOENT, tmp_path / "metrics.jsonl") is None, "the folder is there: another fault"
    assert of(errno.EACCES, tmp_path.parent / "rows.jsonl") is None
