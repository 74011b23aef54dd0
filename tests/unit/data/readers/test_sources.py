from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.readers import json_array, sources
from raytune_llm.errors import DataError

ROWS = [{"text": f"row {number} " + "é☃\n\"'," * (number % 7)} for number in range(1, 400)]


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False))


def write_json_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=37)


def write_arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=37)


def write_arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=37)


WRITERS = {
    "rows.json": write_json,
    "rows.jsonl": write_json_lines,
    "lines.json": write_json_lines,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}


def read_all(path, max_rows=None):
    return [row for chunk in sources.plan(sources.find(str(path)), max_rows) for row in sources.read(chunk)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 500)
    monkeypatch.setattr(json_array, "READ_BYTES", 100)


@pytest.mark.parametrize("name", WRITERS)
def test_every_type_gives_the_rows_with_their_numbers(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read_all(tmp_path / name) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", WRITERS)
def test_rows_do_not_depend_on_where_chunks_end(tmp_path, name, small_chunks):
    WRITERS[name](tmp_path / name)
    chunks = sources.plan(sources.find(str(tmp_path / name)))
    assert len(chunks) > 3
    assert [row for chunk in chunks for row in sources.read(chunk)] == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", WRITERS)
def test_max_rows_takes_the_first_rows(tmp_path, name, small_chunks):
    WRITERS[name](tmp_path / name)
    assert read_all(tmp_path / name, max_rows=123) == list(enumerate(ROWS[:123], 1))


def test_a_text_file_gives_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo")
    assert read_all(tmp_path / "a.txt") == [(1, {"text": "one"}), (3, {"text": "two"})]


def test_a_folder_is_read_in_the_order_of_its_files_names(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    assert [row["text"] for _, row in read_all(tmp_path)] == ["first", "second"]


def test_a_folder_of_several_types_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"\.csv, \.txt"):
        sources.find(str(tmp_path))


def test_a_missing_file_names_the_one_that_was_meant(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no such file.*Did you mean .*train\.jsonl"):
        sources.find(str(tmp_path / "trian.jsonl"))


def test_a_packed_file_says_to_unpack_it(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="Unpack it"):
        sources.find(str(tmp_path / "rows.jsonl.gz"))


@pytest.mark.parametrize(("name", "content"), [("a.json", ""), ("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "a,b\n")])
def test_empty_data_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        read_all(tmp_path / name)


def test_a_line_that_is_not_json_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    rows = read_all(tmp_path / "a.jsonl")
    assert [number for number, _ in rows] == [1, 2, 3]
    assert isinstance(rows[1][1], BadRow)


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": "x', '[{"a": 1}, {"a": 2}', '[{"a": 1}, {"a": 2'])
def test_a_json_array_that_is_cut_off_is_refused_with_its_row(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json, row [23]: the file ends"):
        read_all(tmp_path / "a.json")


def test_json_with_a_fault_in_the_middle_is_refused_with_its_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a" 2}, {"a": "and some more text after the fault"}]')
    with pytest.raises(DataError, match=r"a\.json, row 2: is not valid JSON"):
        read_all(tmp_path / "a.json")


def test_a_json_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_all(tmp_path / "a.json")


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet here")
    with pytest.raises(DataError, match="is not a parquet file"):
        read_all(tmp_path / "a.parquet")


def test_the_fingerprint_is_of_the_contents_and_not_of_the_name(tmp_path):
    for name, content in {"a.txt": "one", "b.txt": "one", "c.txt": "two"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (sources.fingerprint(sources.find(str(tmp_path / f"{name}.txt"))) for name in "abc")
    assert a == b != c
