"""Data in object stores: an S3 server in this process where moto and s3fs are installed, and always fsspec's store in memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import fsspec
import pytest

from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers import files, sources
from raytune_llm.errors import DataError, ResourceError
from tests.s3 import s3_bucket
from tests.unit.data.readers.test_sources import ROWS, WRITERS
from tests.unit.data.test_pipeline import chat


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket("bucket") as address:
        yield address


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")
    yield root
    files_there = fsspec.url_to_fs(root)[0]
    for name in files_there.find("bucket"):
        files_there.rm(name)


def put(path, address):
    with fsspec.open(address, "wb") as there:
        there.write(path.read_bytes())


def read_all(path):
    return [row for chunk in sources.plan(sources.find(path)) for row in sources.read(chunk)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_type_is_read_in_chunks_as_from_disk(store, name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / name)
    put(tmp_path / name, f"{store}/{name}")
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 500)
    assert read_all(f"{store}/{name}") == list(enumerate(ROWS, 1))


def test_a_folder_is_its_files_by_name(store, tmp_path):
    (tmp_path / "rows.txt").write_text("one\n")
    for name in ("b/1.txt", "a.txt", ".hidden.txt"):
        put(tmp_path / "rows.txt", f"{store}/texts/{name}")
    found = sources.find(f"{store}/texts").files
    assert [name.rpartition("texts/")[2] for name in found] == ["a.txt", "b/1.txt"]


def test_the_store_follows_the_contents(store, jsonl, prepare_run):
    put(jsonl([chat(0)]), f"{store}/rows.jsonl")
    run = prepare_run(f"{store}/rows.jsonl")
    first = prepare(run.model, run.data, run.resources)
    assert prepare(run.model, run.data, run.resources).reused
    put(jsonl([chat(1)]), f"{store}/rows.jsonl")
    fsspec.url_to_fs(store)[0].invalidate_cache()
    assert prepare(run.model, run.data, run.resources).store.folder != first.store.folder


def test_what_a_store_says_of_a_file_takes_the_place_of_its_bytes(s3, tmp_path, monkeypatch):
    (tmp_path / "rows.txt").write_text("one\n")
    put(tmp_path / "rows.txt", f"{s3}/rows.txt")
    monkeypatch.setattr(files, "open_file", None)
    assert files.contents_hash(f"{s3}/rows.txt") == files.contents_hash(f"{s3}/rows.txt")


def test_what_is_not_there_is_named(store):
    with pytest.raises(DataError, match=r"nothing\.jsonl: there is no such file or folder"):
        sources.find(f"{store}/nothing.jsonl")


def test_a_store_that_no_package_reads_is_named():
    with pytest.raises(DataError, match=r"nowhere://rows\.jsonl: can't be reached .*nowhere"):
        sources.find("nowhere://rows.jsonl")


def test_a_store_whose_package_is_missing_names_the_extra():
    if find_spec("gcsfs") is not None:
        pytest.skip("the package is there")
    with pytest.raises(ResourceError, match=r"gs:// needs another package .*raytune-llm\[gcs\]"):
        sources.find("gs://bucket/rows.jsonl")


def test_a_hub_whose_package_is_missing_names_the_extra():
    if find_spec("modelscope") is not None:
        pytest.skip("the package is there")
    with pytest.raises(ResourceError, match=r"data\.hub=modelscope .*raytune-llm\[modelscope\]"):
        sources.plan(sources.find("some/rows", hub="modelscope"))
