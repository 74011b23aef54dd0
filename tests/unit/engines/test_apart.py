"""What a server computes beside its engine leaves no threads behind, which would slow each of the engine's steps."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import load_config
from raytune_llm.engines.apart import apart
from raytune_llm.engines.native.adapter_store import AdapterStore
from raytune_llm.serve import engines
from tests.toy_engine import adapter_folder

THREADS = """
import os, time, torch
from raytune_llm.engines.apart import apart

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.rand(1_000_000).exp_()
    return threads()

torch.set_num_threads(4)
before = threads()
assert apart(compute) >= before + 4, "the thread, and three that help it"
until = time.monotonic() + 10
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(threads() - before)
"""


def test_threads_that_helped_end_with_the_thread_that_asked_them():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_an_error_is_the_caller_s():
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)


def test_models_are_loaded_and_adapters_read_in_threads_that_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[threading.Thread] = []

    def build(settings: Any, serving: Any) -> Any:
        seen.append(threading.current_thread())
        raise LookupError

    def read(folder: Path) -> tuple[Any, int]:
        seen.append(threading.current_thread())
        return object(), 8

    run = load_config("serve", ["model=tiny_random"])
    monkeypatch.setitem(engines.ENGINES, "native", engines.EngineKind(build))
    with pytest.raises(LookupError):
        engines.build_engine(run.model, run.quantization, run.engine, run.serve)
    read_again = threading.Event()
    store = AdapterStore(read, max_host=1, num_slots=1, on_read=read_again.set)
    first, _ = store.add("a", adapter_folder(tmp_path / "a", 1), pinned=False)
    store.add("b", adapter_folder(tmp_path / "b", 2), pinned=False)
    assert not store.ready(first)
    assert read_again.wait(10)
    store.close()
    assert len(seen) == 4 and threading.main_thread() not in seen
    assert not any(thread.is_alive() for thread in seen)
