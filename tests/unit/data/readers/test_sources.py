from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import random

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


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True)}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.txt"])
def test_a_packed_text_gives_the_rows_that_are_in_it(tmp_path, name, suffix, small_chunks):
    WRITERS.get(name, write_json_lines)(tmp_path / name)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(PACKERS[suffix]((tmp_path / name).read_bytes()))
    assert len(sources.plan(sources.find(str(packed)))) > 2
    assert read_all(packed) == read_all(tmp_path / name)


def test_what_a_file_is_packed_with_its_bytes_say(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"a": 1}\n'))
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"a": 1}\n')
    assert read_all(tmp_path / "packed.jsonl") == read_all(tmp_path / "plain.jsonl.gz") == [(1, {"a": 1})]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path, suffix):
    draw = random.Random(1)
    lines = "".join(json.dumps({"text": f"{draw.random()}"}) + "\n" for _ in range(5000))
    packed = PACKERS[suffix](lines.encode())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl.*: is damaged after"):
        read_all(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.zip", b"PK\x03\x04"), ("a.jsonl", b"PK\x03\x04"), ("a.jsonl.xz", b"\xfd7zXZ\0"), ("a.parquet.gz", b"\x1f\x8b")],
)
def test_other_packed_files_say_to_unpack_them(tmp_path, name, start):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(DataError, match=r"is compressed \((zip|xz|gzip)\)\. Decompress it"):
        sources.find(str(tmp_path / name))


def test_each_file_of_a_folder_is_looked_at(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:200]))
    (tmp_path / "b.json").write_text(json.dumps(ROWS[200:]))
    assert [row for _, row in read_all(tmp_path)] == ROWS


def broken_link(folder):
    (folder / "b.jsonl").symlink_to(folder / "nowhere.jsonl")
    return "b.jsonl: is a broken link"


def second_file_in_utf16(folder):
    (folder / "b.jsonl").write_text('{"a": 1}\n', encoding="utf-16")
    return "b.jsonl: is UTF-16"


def second_file_of_another_type(folder):
    (folder / "b.xlsx").write_bytes(b"x")
    return "b.xlsx: has a type that is not read"


def second_file_in_a_zip(folder):
    (folder / "b.jsonl").write_bytes(b"PK\x03\x04")
    return "b.jsonl: is compressed (zip)"


def second_file_with_zero_bytes(folder):
    (folder / "b.jsonl").write_bytes(b"{\0}")
    return "b.jsonl: is not text"


def a_pipe(folder):
    os.mkfifo(folder / "b.jsonl")
    return "b.jsonl: is no file that can be read"


@pytest.mark.parametrize(
    "spoil",
    [broken_link, second_file_in_utf16, second_file_of_another_type, second_file_in_a_zip, second_file_with_zero_bytes, a_pipe],
)
def test_no_file_of_a_folder_is_lost_without_a_word(tmp_path, spoil):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n')
    said = spoil(tmp_path)
    with pytest.raises(DataError) as error:
        read_all(tmp_path)
    assert said in str(error.value)


def test_a_folder_that_can_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "sub").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, who may run the tests, may read all
    with pytest.raises(DataError, match="sub: can't be read \\(Permission denied"):
        sources.find(str(tmp_path))


def test_folders_behind_links_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "above").symlink_to(tmp_path / "set")
    assert read_all(tmp_path / "set") == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("name", "said"), [("circle.jsonl", "is a broken link"), ("pipe.jsonl", "is neither a file nor a folder")]
)
def test_what_is_there_and_is_no_file_is_not_called_missing(tmp_path, name, said):
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=said):
        sources.find(str(tmp_path / name))


@pytest.mark.parametrize("path", ["a" * 300, "/" + "a/" * 3000, "nul\0.jsonl", "", " "])
def test_a_path_that_can_be_none_is_an_error(path):
    with pytest.raises(DataError):
        sources.find(path)


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1} {"a": 2}]', "row 2: there is no comma between this row"),
        ('[{"a": 1}\n{"a": 2}, {"a": 3}]', "row 2: there is no comma between this row"),
        ('[{"a": 1}, {"a": 2},]', "row 3: there is a comma after the last row"),
        ('[{"a": 1},, {"a": 2}]', "row 2: is not valid JSON"),
        ('[, {"a": 2}]', "row 1: is not valid JSON"),
        ("[,]", "row 1: is not valid JSON"),
    ],
)
def test_a_json_array_with_missing_or_more_commas_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError) as error:
        read_all(tmp_path / "a.json")
    assert said in str(error.value)


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


def test_a_large_source_has_larger_chunks_and_not_more_than_a_process_can_map():
    assert [sources.chunk_bytes_of(size) for size in (0, 2**20, 2**30, 2**36)] == [2**20, 2**20, 2**24, 2**26]
    for size in (2**40, 2**42, 5 * 2**42):
        assert size / sources.chunk_bytes_of(size) <= 2**14 + 1
