"""Output folders become models while the server runs: the engine is real, the model is a toy."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_llm import api
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.errors import DataError
from raytune_llm.runs.checkpoint_adapter import adapter_of_checkpoint
from raytune_llm.serve.watch import Watcher
from tests.runs import tiny_run
from tests.toy_engine import END, Tokenizer, ToyRunner, adapter_folder, answer


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    runner: Any = ToyRunner()
    made = NativeEngine(runner, Tokenizer(), end_ids=[END], max_length=100)
    yield made
    made.close()


def names(engine: NativeEngine) -> set[str]:
    return {one.name for one in engine.adapters()}


def finished(outputs: Path, run: str, weights: int) -> Path:
    """As a run writes it: beside, then renamed."""
    (outputs / run).mkdir(parents=True, exist_ok=True)
    beside = adapter_folder(outputs / run / ".final-new", weights)
    shutil.rmtree(outputs / run / "final", ignore_errors=True)
    return beside.rename(outputs / run / "final")


def asked(engine: NativeEngine, name: str) -> list[int]:
    return list(engine.submit(Request(prompt_ids=[5], adapter=name, sampling=Sampling(max_new_tokens=4))).result().ids)


def test_runs_become_models_by_their_names_and_go_with_their_folders(engine: NativeEngine, tmp_path: Path):
    watcher = Watcher(tmp_path, engine, base_name="base")
    watcher.scan()
    assert names(engine) == set()
    finished(tmp_path, "one", 1)
    (tmp_path / "two").mkdir()
    watcher.scan()
    assert names(engine) == {"one"}
    finished(tmp_path, "two", 2)
    shutil.rmtree(tmp_path / "one")
    watcher.scan()
    assert names(engine) == {"two"}


def test_a_run_that_writes_again_is_a_new_version(engine: NativeEngine, tmp_path: Path):
    watcher = Watcher(tmp_path, engine, base_name="base")
    finished(tmp_path, "mine", 1)
    watcher.scan()
    assert asked(engine, "mine") == answer([5], 1, 4)
    finished(tmp_path, "mine", 2)
    watcher.scan()
    assert asked(engine, "mine") == answer([5], 2, 4)


def test_what_does_not_fit_is_said_once_and_tried_again_when_it_changed(engine: NativeEngine, tmp_path: Path):
    told: list[str] = []
    watcher = Watcher(tmp_path, engine, base_name="base", notify=told.append)
    finished(tmp_path, "mine", -1)
    finished(tmp_path, "base", 1)
    for _ in range(3):
        watcher.scan()
    assert names(engine) == set() and len(told) == 2 and "must not be the base's" in told[0]
    finished(tmp_path, "mine", 3)
    watcher.scan()
    assert asked(engine, "mine") == answer([5], 3, 4)


def test_a_config_that_is_written_after_the_weights_is_a_new_version(engine: NativeEngine, tmp_path: Path):
    """PEFT writes it last."""
    watcher = Watcher(tmp_path, engine, base_name="base")
    final = finished(tmp_path, "mine", 1)
    versions = []
    for config in ("{", '{"r": 8}', '{"r": 8}'):
        (final / "adapter_config.json").write_text(config)
        watcher.scan()
        versions += [one.version for one in engine.adapters()]
    assert versions[0] != versions[1] == versions[2]


def test_a_folder_that_is_being_replaced_stays(engine: NativeEngine, tmp_path: Path):
    watcher = Watcher(tmp_path, engine, base_name="base")
    final = finished(tmp_path, "mine", 1)
    watcher.scan()
    aside = final.rename(tmp_path / "mine" / ".final-old")
    ended: list[str] = []
    thread = threading.Thread(target=lambda: (time.sleep(0.01), aside.rename(final)))
    engine.remove_adapter = ended.append  # type: ignore[method-assign]
    thread.start()
    watcher.scan()
    thread.join()
    assert not ended and asked(engine, "mine") == answer([5], 1, 4)


def test_a_run_takes_no_name_of_another_adapter_in_the_settings(engine: NativeEngine, tmp_path: Path):
    told: list[str] = []
    folders = {"mine": str(adapter_folder(tmp_path / "elsewhere", 1)), "own": str(tmp_path / "outputs" / "own" / "final")}
    for name, folder in (("mine", folders["mine"]), ("own", str(finished(tmp_path / "outputs", "own", 2)))):
        engine.add_adapter(name, folder)
    watcher = Watcher(tmp_path / "outputs", engine, base_name="base", adapters=folders, notify=told.append)
    for weights in (3, 4):
        for run in folders:
            finished(tmp_path / "outputs", run, weights)
        watcher.scan()
        assert (asked(engine, "mine"), asked(engine, "own")) == (answer([5], 1, 4), answer([5], weights, 4))
    assert any("mine is not served: a run's name must not be that of another adapter" in line for line in told)
    shutil.rmtree(tmp_path / "outputs" / "mine")
    watcher.scan()
    assert asked(engine, "mine") == answer([5], 1, 4)


def test_what_was_unloaded_meanwhile_may_go(engine: NativeEngine, tmp_path: Path):
    watcher = Watcher(tmp_path, engine, base_name="base")
    finished(tmp_path, "one", 1)
    watcher.scan()
    engine.remove_adapter("one")
    shutil.rmtree(tmp_path / "one")
    watcher.scan()
    assert names(engine) == set()


def test_one_folder_that_nobody_expected_keeps_no_other_from_being_served(engine: NativeEngine, tmp_path: Path):
    told: list[str] = []
    watcher = Watcher(tmp_path, engine, base_name="base", notify=told.append, interval_s=0.02)
    watcher.start()
    try:
        (finished(tmp_path, "broken", 1) / "adapter_model.safetensors").write_text("no number")
        finished(tmp_path, "sound", 2)
        until = time.monotonic() + 30
        while names(engine) != {"sound"} and time.monotonic() < until:
            time.sleep(0.01)
        assert asked(engine, "sound") == answer([5], 2, 4)
        assert [line for line in told if line.startswith("broken is not served: JSONDecodeError")]
        finished(tmp_path, "broken", 3)
        while names(engine) != {"sound", "broken"} and time.monotonic() < until:
            time.sleep(0.01)
        assert asked(engine, "broken") == answer([5], 3, 4)
    finally:
        watcher.stop()


def test_a_run_that_can_t_be_read_is_said_once_and_keeps_what_is_served_of_it_and_of_others(engine: NativeEngine, tmp_path: Path):
    told: list[str] = []
    watcher = Watcher(tmp_path, engine, base_name="base", notify=told.append)
    for number, run in enumerate(("a", "z")):
        finished(tmp_path, run, number + 1)
    watcher.scan()
    (tmp_path / "a/checkpoints").symlink_to(tmp_path / "a/checkpoints")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    finished(tmp_path, "z", 5)
    del told[:]
    for _ in range(3):
        watcher.scan()
    assert names(engine) == {"a", "z"} and asked(engine, "z") == answer([5], 5, 4)
    assert sum("a can't be read" in line for line in told) == sum("loop can't be read" in line for line in told) == 1
    assert len(told) == 3
    (tmp_path / "a/checkpoints").unlink()
    shutil.rmtree(tmp_path / "a")
    watcher.scan()
    assert names(engine) == {"z"}


def test_it_looks_by_itself(engine: NativeEngine, tmp_path: Path):
    watcher = Watcher(tmp_path, engine, base_name="base", interval_s=0.02)
    watcher.start()
    try:
        finished(tmp_path, "late", 1)
        until = time.monotonic() + 5
        while names(engine) != {"late"} and time.monotonic() < until:
            time.sleep(0.01)
        assert names(engine) == {"late"}
    finally:
        watcher.stop()


class Folders:
    """An engine that notes the folders of its adapters."""

    def __init__(self) -> None:
        self.held: dict[str, Path] = {}

    def add_adapter(self, name: str, folder: str | Path) -> str:
        self.held[name] = Path(folder)
        return "0"

    def remove_adapter(self, name: str) -> None:
        del self.held[name]


@pytest.fixture
def trained(chat_rows: str, cache: str, tmp_path: Path) -> Path:
    """A run with checkpoints of its first and its last step."""
    settings = ["adapter=lora", "adapter.rank=4", "train.max_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=2"]
    api.train(tiny_run(chat_rows, cache, tmp_path / "outputs" / "mine", *settings))
    return tmp_path / "outputs" / "mine"


def test_the_newest_checkpoint_of_a_run_is_its_adapter(trained: Path, tmp_path: Path):
    """Of the checkpoint of its last step: what final/ holds. Those of earlier steps leave no files behind."""
    made, last = tmp_path / "made", trained / "checkpoints" / "step-2"
    assert adapter_of_checkpoint(trained, 2, made)
    made, final = (load_file(folder / "adapter_model.safetensors") for folder in (made, trained / "final"))
    assert made.keys() == final.keys() and all(torch.equal(made[name], final[name]) for name in made)
    assert any(value.abs().max() > 0 for name, value in made.items() if "lora_B" in name)

    engine = Folders()
    watcher = Watcher(tmp_path / "outputs", engine, base_name="base")
    aside = last.rename(tmp_path / "aside")
    watcher.scan()
    assert engine.held.keys() == {"mine", "mine@1"} and engine.held["mine"] == trained / "final"
    first = engine.held["mine@1"]
    assert first.is_dir()
    aside.rename(last)
    watcher.scan()
    assert engine.held.keys() == {"mine", "mine@2"}
    assert load_file(engine.held["mine@2"] / "adapter_model.safetensors").keys() == made.keys()
    assert not first.exists()
    watcher.stop()
    assert not engine.held["mine@2"].exists()


def test_a_checkpoint_outside_of_the_folder_is_not_served(trained: Path, tmp_path: Path):
    told: list[str] = []
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "link").symlink_to(trained)
    engine = Folders()
    watcher = Watcher(tmp_path / "watched", engine, base_name="base", notify=told.append)
    watcher.scan()
    assert engine.held == {} and sum("must be inside a folder" in line for line in told) == 2
    watcher.stop()


class Runs:
    """Pickled, it is a call of whoever reads it."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


def test_a_checkpoint_with_a_damaged_or_a_foreign_list_is_not_served_and_runs_nothing(trained: Path, tmp_path: Path):
    told: list[str] = []
    engine, marker = Folders(), tmp_path / "was_run"
    watcher = Watcher(tmp_path / "outputs", engine, base_name="base", notify=told.append)
    checkpoint = trained / "checkpoints" / "step-2"
    whole = (checkpoint / "state" / ".metadata").read_bytes()
    for content in (whole[:-100], b"", b"no pickle", pickle.dumps(Runs(marker)), pickle.dumps([1])):
        (checkpoint / "state" / ".metadata").write_bytes(content)
        with (checkpoint / "progress.json").open("a") as file:
            file.write(" ")  # a change of the checkpoint
        watcher.scan()
        assert engine.held.keys() == {"mine"}
        with pytest.raises(DataError, match=r"\.metadata"):
            adapter_of_checkpoint(trained, 2, tmp_path / "made")
    assert not marker.exists()
    assert sum(line.startswith("mine@2 is not served") for line in told) == 5
    watcher.stop()
