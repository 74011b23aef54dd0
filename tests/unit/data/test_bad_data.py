"""Data as they come: each fault ends in an error with the file and row, or in a counted skip."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.config.load import load_config
from raytune_llm.config.options import options
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import convert
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers import json_array, sources
from raytune_llm.data.readers.chunks import Source
from raytune_llm.errors import DataError, UserError
from raytune_llm.records import Record

ROW = {"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes."}]}
LINE = json.dumps(ROW) + "\n"


def packed_as_zip(data):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("rows.jsonl", data)
    return stream.getvalue()


def damaged_parquet():
    """The second of its three groups of rows is not what was written."""
    stream = io.BytesIO()
    table = pa.table({"messages": [f"text {number}" for number in range(3000)]})
    pq.write_table(table, stream, row_group_size=1000, compression="snappy", use_dictionary=False)
    data = bytearray(stream.getvalue())
    start = pq.read_metadata(stream).row_group(1).column(0).data_page_offset
    data[start + 50 : start + 2000] = bytes(1950)
    return bytes(data)


def encrypted_parquet() -> bytes:
    class Keys(encryption.KmsClient):
        def __init__(self, _: object) -> None:
            super().__init__()

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

    factory = encryption.CryptoFactory(Keys)
    settings = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": ["a"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    stream, table = io.BytesIO(), pa.table({"a": ["secret"]})
    with pq.ParquetWriter(stream, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return stream.getvalue()


REFUSED = {
    "a JSON array that is cut off": ("a.json", json.dumps([ROW, ROW])[:-40], "row 2: the file ends in the middle"),
    "a JSON array that lacks its bracket": ("a.json", json.dumps([ROW])[:-1], "the file ends before the array's closing"),
    "two JSON arrays": ("a.json", json.dumps([ROW]) + "\n" + json.dumps([ROW]), "continues after the array's closing bracket"),
    "a JSON object over several lines": ("a.json", json.dumps({"data": [ROW]}, indent=1), "holds an object over several lines"),
    "a JSON array of endless depth": ("a.json", "[" * 5000, "row 1: can't be read"),
    "a damaged parquet": ("a.parquet", damaged_parquet(), "after row 1000: can't be read"),
    "a JSON number": ("a.json", "7", "must hold an array of rows"),
    "JSON in Latin-1": ("a.json", '[{"text": "é"}]'.encode("latin-1"), "row 1: is not UTF-8"),
    "lines in UTF-16": ("a.jsonl", LINE.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "csv in Latin-1": ("a.csv", "messages\né\n".encode("latin-1"), "row 1: is not valid csv"),
    "csv with an open quote": ("a.csv", 'messages\n"a', "row 1: is not valid csv"),
    "csv with a column twice": ("a.csv", "messages,messages\na,b\n", "names the column 'messages' twice"),
    "a packed file that is cut off": ("a.jsonl.gz", gzip.compress(LINE.encode())[:-10], "is damaged after"),
    "packed parquet": ("a.parquet.gz", gzip.compress(damaged_parquet()), "is compressed (gzip). Decompress it first"),
    "a JSON array without a comma": ("a.json", json.dumps([ROW]).replace("}, {", "} {"), "row 1: is not valid JSON"),
    "zip": ("a.zip", packed_as_zip(LINE), "is compressed (zip). Decompress it first"),
    "a pointer of Git LFS": ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid 7\n", "`git lfs pull`"),
    "a web page": ("a.jsonl", "\n<!DOCTYPE html><html></html>", "is a web page"),
    "an encrypted parquet": ("a.parquet", encrypted_parquet(), "Write it without encryption"),
    "an empty file": ("a.jsonl", "", "holds no rows"),
    "an empty array": ("a.json", "[]", "holds no rows"),
    "an empty parquet": ("a.parquet", "", "is not a parquet file"),
    "an empty arrow": ("a.arrow", "", "is not an arrow file"),
    "another file called arrow": ("a.arrow", "no arrow here", "is not an arrow file"),
    "a table": ("a.xlsx", "PK", "has a type that is not read (.xlsx)"),
    "lines of no JSON": ("a.jsonl", "yes\nno\n", "no row can be used. Dropped: 2 x the line is not valid JSON"),
    "lines in Latin-1": ("a.jsonl", '{"a": "é"}\n'.encode("latin-1"), "Dropped: 1 x the line is not UTF-8"),
    "lines of no objects": ("a.jsonl", "1\nnull\n", "no row can be used. Dropped: 2 x a row must be an object"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_can_not_be_read_is_refused_and_leaves_no_store(tmp_path, prepare_run, fault):
    name, content, said = REFUSED[fault]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run = prepare_run(path)
    with pytest.raises(DataError) as error:
        prepare(run.model, run.data, run.resources)
    assert str(path) in str(error.value) and said in str(error.value)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_a_refusal_names_the_file_of_its_own_command(tmp_path, prepare_run):
    """Equal rows share a folder of shards in the cache, and a shard says which rows were dropped."""
    for name in ("first.jsonl", "second.jsonl"):
        path = tmp_path / name
        path.write_text('{"other": 1}\n' * 2)
        run = prepare_run(path)
        with pytest.raises(DataError, match=f"{name}, rows 1, 2: there are other"):
            prepare(run.model, run.data, run.resources)


MESSAGES = ROW["messages"]
SKIPPED = {
    "a line that is cut off": LINE[:-20],
    "a line in Latin-1": LINE.replace("Yes", "Oué").encode("latin-1"),
    "a line of endless depth": "[" * 5000 + "]" * 5000,
    "a number of 5000 digits": "9" * 5000,
    "no object": "[1]",
    "no messages": {"messages": None},
    "another column": {"conversations": MESSAGES},
    "messages that are text": {"messages": "Say yes."},
    "messages that are a number": {"messages": 7},
    "a message that is null": {"messages": [None, MESSAGES[1]]},
    "a content that is null": {"messages": [{"role": "user", "content": None}, MESSAGES[1]]},
    "a content that is a number": {"messages": [{"role": "user", "content": 7}, MESSAGES[1]]},
    "a part that is null": {"messages": [{"role": "user", "content": [None]}, MESSAGES[1]]},
    "a lone surrogate": {"messages": [{"role": "user", "content": "\ud83d"}, MESSAGES[1]]},
    "a role that is null": {"messages": [{"role": None, "content": "a"}, MESSAGES[1]]},
    "a call that is null": {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [None]}]},
    "arguments that are a number": {
        "messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 7}}]}]
    },
    "tools that are no JSON": {**ROW, "tools": "[{"},
    "tools that are null inside": {**ROW, "tools": [None]},
}


@pytest.mark.parametrize("fault", SKIPPED)
def test_a_row_that_can_not_be_used_is_skipped_counted_and_shown(tmp_path, prepare_run, fault):
    row = SKIPPED[fault]
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).strip().encode() + b"\n"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE.encode() + line + LINE.encode())
    run = prepare_run(path, "data.max_bad_fraction=0.5")
    store = prepare(run.model, run.data, run.resources).store
    assert (len(store), store.dropped.total) == (2, 1)
    assert all(f"{path}, row 2" in example for examples in store.dropped.examples.values() for example in examples)


def test_a_line_of_100_megabytes_is_skipped(tmp_path, prepare_run):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.write(LINE)
        file.write(LINE.replace("Yes.", "y" * 100_000_000))
        file.write(LINE)
    run = prepare_run(path, "data.max_bad_fraction=0.5")
    store = prepare(run.model, run.data, run.resources).store
    assert (len(store), store.dropped.total) == (2, 1)
    assert "the row is longer than 33,554,432 characters" in str(store.dropped)


def test_an_element_without_an_end_is_refused_before_the_whole_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "MAX_ROW_CHARS", 1 << 21)
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "' + "y" * (1 << 23))
    with pytest.raises(DataError, match=r"rows\.json, row 1: has no end within 2,097,152 characters"):
        sources.plan(sources.find(str(path)))


def test_a_csv_field_may_be_long(tmp_path, prepare_run):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["instruction", "output"], ["Say yes.", "yes " * 100_000]])
    run = prepare_run(path, data="alpaca")
    assert len(prepare(run.model, run.data, run.resources).store) == 1


def test_an_array_under_the_suffix_of_lines_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps([ROW, ROW]))
    chunks = sources.plan(sources.find(str(tmp_path / "rows.jsonl")))
    assert [row for chunk in chunks for row in sources.read(chunk)] == [(1, ROW), (2, ROW)]


def test_a_text_of_a_table_that_is_no_text_is_skipped(tmp_path, prepare_run):
    texts = pa.array([b"Yes.", b"\xff\xfe", b"No."], pa.binary())
    table = pa.table({"instruction": ["a", "b", "c"], "output": texts.view(pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    run = prepare_run(tmp_path / "rows.parquet", "data.max_bad_fraction=0.5", data="alpaca")
    store = prepare(run.model, run.data, run.resources).store
    assert (len(store), store.dropped.counts) == (2, {"a text is not UTF-8": 1})


def test_a_parquet_column_of_the_wrong_type_is_skipped_row_by_row(tmp_path, prepare_run):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": [1, 2], "output": ["yes", "no"]}), path)
    run = prepare_run(path, data="alpaca")
    with pytest.raises(DataError, match="Dropped: 2 x instruction must be text"):
        prepare(run.model, run.data, run.resources)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": {"file_name": "a.jsonl"}, "a": {"file_name": "b.jsonl"}}', "'a' is there twice"),
        ('{"a": {"file_name"', "is not valid JSON"),
        ('["a"]', "must hold an object of data sets by name"),
        ('{"a": "a.jsonl"}', "must hold an object of data sets by name"),
        ('{"a": {"file_name": 5}}', "file_name must be text, got 5"),
        ('{"a": {"file_name": "a.jsonl", "num_samples": 0}}', "num_samples must be a positive number, got 0"),
        ('{"a": {"file_name": "a.jsonl", "columns": {"prompt": 3}}}', "columns.prompt must be text, got 3"),
        ('{"a": {"file_name": "a.jsonl", "columns": {}}}', "names no column for prompt"),
    ],
)
def test_a_declaration_that_can_not_be_read_is_refused(tmp_path, prepare_run, content, said):
    (tmp_path / "dataset_info.json").write_text(content)
    run = prepare_run("null", f"data.dataset_info={tmp_path}", "data.names=[a]")
    with pytest.raises(UserError, match=said):
        prepare(run.model, run.data, run.resources)


def test_a_hub_that_does_not_answer_is_said_in_seconds(prepare_run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    run = prepare_run("owner/name")
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"owner/name: .*no hub answers at http://127\.0\.0\.1:9"):
        prepare(run.model, run.data, run.resources)
    assert time.perf_counter() - began < 20


def test_a_hub_data_set_can_lie_in_a_folder(tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, text in (("a", "first"), ("b", "second")):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    source = Source(("hub",), (str(tmp_path / "set"),), split="train", folder="b")
    (chunk,) = sources.plan(source)
    assert list(sources.read(chunk)) == [(1, {"text": "second"})]


@pytest.mark.parametrize("label", ["true", "True", "1", "false", "FALSE", "0"])
def test_labels_of_csv_rows_are_read_as_they_are_written(tmp_path, prepare_run, label):
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,output,label\nSay yes.,Yes.,{label}\n")
    run = prepare_run(path, data="alpaca_labeled")
    store = prepare(run.model, run.data, run.resources, kind="labeled").store
    assert len(store) == 1


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "chosen", "rejected", "label",
    "prompt", "completion", "text", "images",
)  # fmt: skip


FORMATS = {data: load_config("prepare", [f"data={data}", "data.path=rows.jsonl"]).data.format for data in options("data")}


@pytest.mark.parametrize("data", FORMATS)
@given(row=st.dictionaries(st.sampled_from(COLUMNS), ANY) | ANY)
def test_whatever_a_row_holds_it_is_read_or_is_a_bad_row(data, row):
    def read():
        try:
            return convert(row, FORMATS[data])
        except BadRow as bad:
            return bad

    assert isinstance(read(), BadRow | Record)
