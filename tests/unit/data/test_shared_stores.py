"""Token stores in an object store (S3 as moto plays it in this process), and copies of machines that share nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_llm.config.load import load_config
from raytune_llm.config.run import PrepareRun
from raytune_llm.data import pipeline, shared_stores
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers import sources
from raytune_llm.data.shared_stores import SharedStore, open_store
from raytune_llm.data.store import MANIFEST
from raytune_llm.errors import ConfigError, DataError, ResourceError
from raytune_llm.object_store import RemoteFolder
from tests.s3 import s3_bucket

Machine = Callable[[str], None]


def chat(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket("stores") as address:
        yield address


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Machines differ by their cache."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def prepared(run: PrepareRun) -> pipeline.Prepared:
    return prepare(run.model, run.data, run.resources)


def rows_of(prepared: pipeline.Prepared) -> list[list[int]]:
    return [prepared.store.row(number)[0].tolist() for number in range(len(prepared.store))]


def test_another_machine_copies_the_store_and_tokenizes_nothing(s3, jsonl, prepare_run, on_machine, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 300)
    run = prepare_run(jsonl([chat(number) for number in range(20)]), f"data.cache={s3}/copied")
    on_machine("one")
    first = prepared(run)
    assert not first.reused and len(first.store.manifest["shards"]) > 3
    monkeypatch.setattr(pipeline, "prepare_chunk", lambda *chunk: pytest.fail("tokenized again"))
    on_machine("other")
    second = prepared(run)
    assert second.reused and rows_of(second) == rows_of(first) and second.manifests == first.manifests
    assert second.store.folder.is_relative_to(tmp_path / "other") and second.places == first.places
    assert first.places[0].startswith(f"{s3}/copied/")
    on_machine("worker")
    of_worker = open_store(first.places[0])
    assert of_worker.folder.is_relative_to(tmp_path / "worker") and of_worker.manifest_hash == first.store.manifest_hash


def test_another_machine_finishes_what_a_crashed_one_began(s3, jsonl, prepare_run, on_machine, monkeypatch):
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 300)
    make, made = pipeline.prepare_chunk, []

    def two_alone(*chunk: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("the machine is gone")
        made.append(chunk[2].name)
        return make(*chunk)

    monkeypatch.setattr(pipeline, "prepare_chunk", two_alone)
    run = prepare_run(jsonl([chat(number) for number in range(20)]), f"data.cache={s3}/crashed")
    on_machine("one")
    with pytest.raises(RuntimeError, match="gone"):
        prepared(run)
    assert not any(name.endswith(MANIFEST) for name in RemoteFolder(f"{s3}/crashed").files())
    again: list[str] = []
    monkeypatch.setattr(pipeline, "prepare_chunk", lambda *chunk: again.append(chunk[2].name) or make(*chunk))
    on_machine("other")
    shards = {shard["name"] for shard in prepared(run).store.manifest["shards"]}
    assert len(made) == 2 and set(made) | set(again) == shards and not set(made) & set(again)


def test_a_machine_that_has_the_store_gives_an_object_store_what_it_lacks(s3, jsonl, prepare_run, on_machine):
    run = prepare_run(jsonl([chat(number) for number in range(3)]), f"data.cache={s3}/lost")
    on_machine("one")
    first = prepared(run)
    RemoteFolder(s3).remove("lost")
    assert prepared(run).reused
    on_machine("other")
    assert open_store(first.places[0]).manifest_hash == first.store.manifest_hash


def test_machines_that_build_at_once_end_with_one_store(s3, jsonl, prepare_run, on_machine, monkeypatch):
    """Where dropped rows were is written into the store, and their files may lie elsewhere on another machine."""
    rows = [chat(0), {"messages": []}, chat(1)]
    words = ("data.max_bad_fraction=1", f"data.cache={s3}/at_once")
    on_machine("one")
    mine = prepare_run(jsonl(rows), *words)
    theirs = prepare_run(jsonl(rows, name="moved.jsonl"), *words)
    publish, others = SharedStore.publish, []

    def after_another(store: SharedStore) -> None:
        if not others:
            others.append(None)
            on_machine("other")
            others[0] = prepared(theirs)
            on_machine("one")
        publish(store)

    monkeypatch.setattr(SharedStore, "publish", after_another)
    first = prepared(mine)
    [second] = others
    assert second is not None and not second.reused and not first.reused
    assert first.manifests == second.manifests
    first.store.verify()


def test_several_data_sets_are_copied_with_what_joins_them(s3, jsonl, prepare_run, on_machine):
    places = {name: jsonl([chat(number)] * number, name=f"{name}.jsonl") for number, name in enumerate(("a", "b"), 1)}
    held_out = f"data.eval_path={{a:{places['a']},b:{places['b']}}}"
    run = prepare_run(jsonl([chat(0)]), held_out, f"data.cache={s3}/joined")
    on_machine("one")
    first = prepared(run).eval_store
    on_machine("other")
    copied = open_store(first.place)
    assert len(copied) == 3 and copied.sources == ("a", "b") and copied.manifest_hash == first.manifest_hash


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda remote, name: remote.write(name, b"x" + (remote.read(name) or b"")[1:]), "has other bytes than were written"),
        (lambda remote, name: remote.remove(name), "is missing"),
    ],
)
def test_a_shard_that_is_damaged_in_the_store_is_refused_by_name(harm, said, s3, jsonl, prepare_run, on_machine):
    on_machine("one")
    folder = said.split()[1]
    first = prepared(prepare_run(jsonl([chat(0)]), f"data.cache={s3}/{folder}"))
    remote = RemoteFolder(first.places[0])
    [shard] = [name for name in remote.files() if name.endswith(".arrow")]
    harm(remote, shard)
    on_machine("other")
    with pytest.raises(DataError, match=rf"{folder}/\w+/shard-00000\.arrow: {said}\. Delete s3://"):
        open_store(first.places[0])


def test_a_machine_s_own_copy_that_was_damaged_is_refused_by_name(s3, jsonl, prepare_run, on_machine):
    on_machine("one")
    place = prepared(prepare_run(jsonl([chat(0)]), f"data.cache={s3}/own")).places[0]
    on_machine("worker")
    shard = open_store(place).folder / "shard-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + b"x" + content[len(content) // 2 + 1 :])
    with pytest.raises(DataError, match=rf"{shard}: does not match its hash"):
        open_store(place)


def test_a_copy_that_can_not_be_written_is_refused_by_what_sets_its_place(s3, jsonl, prepare_run, on_machine, tmp_path):
    (tmp_path / "file").write_text("")
    on_machine("file")
    said = rf"this machine's copy of {s3}/x/\w+ must be a folder that can be written .*XDG_CACHE_HOME"
    with pytest.raises(ResourceError, match=said):
        prepared(prepare_run(jsonl([chat(0)]), f"data.cache={s3}/x"))


def test_a_cache_that_can_not_be_written_is_refused(s3, jsonl, prepare_run, on_machine):
    on_machine("one")
    with pytest.raises(ConfigError, match=r"data\.cache must be a folder that can be written .*s3://no-such-bucket/x"):
        prepared(prepare_run(jsonl([chat(0)]), "data.cache=s3://no-such-bucket/x"))


def test_a_stream_s_shards_are_read_while_they_are_written_which_needs_a_folder():
    words = ["data.path=x", "data.cache=s3://b/x", "data.streaming=true", "train.max_steps=2", "checkpoint.every_steps=1"]
    with pytest.raises(ConfigError, match=r"data\.cache can't be combined with data\.streaming=true"):
        load_config("train", words)


def test_a_folder_that_ends_with_its_manifest_is_copied_whole(s3, on_machine):
    place = f"{s3}/tables/reference-1"
    on_machine("one")
    folder = shared_stores.local_folder(place)
    folder.mkdir(parents=True)
    np.save(folder / "values.npy", np.arange(3))
    (folder / MANIFEST).write_text("{}")
    assert not shared_stores.has_folder(place)
    shared_stores.publish_folder(place)
    on_machine("other")
    copied = shared_stores.fetch_folder(place)
    assert shared_stores.has_folder(place) and copied != folder
    assert np.load(copied / "values.npy").tolist() == [0, 1, 2] and (copied / MANIFEST).exists()


def test_of_two_machines_that_publish_a_folder_at_the_same_time_the_first_one_s_is_read_whole(s3, on_machine):
    place = f"{s3}/tables/reference-2"
    for machine in ("one", "two"):
        on_machine(machine)
        folder = shared_stores.local_folder(place)
        folder.mkdir(parents=True)
        (folder / "values").write_text(machine)
        (folder / MANIFEST).write_text(f"of {machine}")
        shared_stores.publish_folder(place)
    on_machine("other")
    copied = shared_stores.fetch_folder(place)
    assert {file.name: file.read_text() for file in copied.iterdir()} == {"values": "one", MANIFEST: "of one"}
    assert len(RemoteFolder(place).files()) == 2, "what nobody will read is removed"


def test_a_folder_of_which_the_files_lie_beside_the_manifest_is_read_as_well(s3, on_machine):
    place = f"{s3}/tables/reference-3"
    for name in ("values", MANIFEST):
        RemoteFolder(place).write(name, name.encode())
    on_machine("other")
    copied = shared_stores.fetch_folder(place)
    assert {file.name: file.read_text() for file in copied.iterdir()} == {"values": "values", MANIFEST: MANIFEST}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format_version": 4}'])
@pytest.mark.parametrize("where", ["store", "copy"])
def test_a_damaged_manifest_is_refused_by_name(where, content, s3, jsonl, prepare_run, on_machine, tmp_path):
    on_machine("one")
    run = prepare_run(jsonl([chat(0)]), f"data.cache={s3}/manifest_{where}_{content.hex()[:9]}")
    first = prepared(run)
    if where == "store":
        RemoteFolder(first.places[0]).write(MANIFEST, content)
        on_machine("other")
    else:
        (first.store.folder / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: (is not readable|lacks .*)\. Delete .* and run prepare again"):
        open_store(first.places[0])
