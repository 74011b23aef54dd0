from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


STARTS_PROCESSES = ("two_workers", "four_workers", "mark.ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where two processes share the tests (-n 2), the tests of a file stay together, and one process takes all files whose tests
    start processes of their own, in turn: a Ray cluster, a group of workers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "processes" if _has(file, *STARTS_PROCESSES) else file

    config.option.loadscopereorder = False  # by number of tests: the order here is by time
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, the longest files begin, so that no process is alone with one at the end."""

    def rank(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return 0 if _has(file, *STARTS_PROCESSES) else 1 if _has(file, "mark.long") else 2

    if hasattr(config, "workerinput"):
        items.sort(key=rank)


def _has(file: str, *words: str) -> bool:
    return any(word in _text(file) for word in words)


@functools.cache
def _text(file: str) -> str:
    return Path(__file__).parents[1].joinpath(file).read_text()


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """61 conversations of very different lengths."""
    draw = random.Random(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine", "small", "birds"]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.choice([least, most, draw.randint(least, most)])))

    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    with path.open("w") as file:
        for _ in range(61):
            turns = [{"role": role, "content": text(1, 14)} for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def two_workers() -> Iterator[object]:
    from tests.group import Group

    group = Group(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four_workers() -> Iterator[object]:
    from tests.group import Group

    group = Group(4)
    yield group
    group.close()
