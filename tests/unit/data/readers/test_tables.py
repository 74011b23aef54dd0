"""Tables give the rows that JSON lines would, whatever else is in them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers import sources


def write_arrow(table, path):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


WRITERS = {"rows.parquet": pq.write_table, "rows.arrow": write_arrow}


def read_all(path, columns=None):
    return [row for chunk in sources.plan(sources.find(str(path))) for _, row in sources.read(chunk, columns)]


def call(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


def rows_of_tools():
    user = {"role": "user", "content": "Oslo?"}
    return [
        {
            "messages": [user, call("weather", {"city": "Oslo"})],
            "tools": [tool("weather", city={"type": "string", "enum": ["Oslo"]})],
        },
        {
            "messages": [user, call("time", {"zone": "CET", "exact": True})],
            "tools": [tool("time", zone={"type": "string"}, exact={"type": "boolean"})],
        },
        {"messages": [user, {"role": "assistant", "content": "No.", "weight": 0.5}]},
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_with_different_tools_are_what_json_lines_give(tmp_path, name, prepare_run, jsonl):
    rows = rows_of_tools()
    WRITERS[name](pa.Table.from_pylist(rows), tmp_path / name)
    path = jsonl(rows, "rows.jsonl")
    stores = []
    for file in (tmp_path / name, path):
        run = prepare_run(file, "data.template=qwen", "model.tokenizer=bytes")
        stores.append(prepare(run.model, run.data, run.resources).store)
    for number in range(len(rows)):
        assert all(list(a) == list(b) for a, b in zip(stores[0].row(number), stores[1].row(number), strict=True))


LEAF = st.text(max_size=5) | st.text(max_size=5)
OBJECT = st.dictionaries(st.sampled_from("abc"), LEAF, max_size=3)


@settings(max_examples=50)
@given(rows=st.lists(st.dictionaries(st.sampled_from("xyz"), OBJECT, min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_a_table_pads_objects_with_is_not_there(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    write_arrow(pa.table({"row": pa.array([[row] for row in rows])}), path)
    assert [row["row"] for row in read_all(path)] == [[row] for row in rows]


def test_a_map_is_an_object(tmp_path):
    column = pa.array([[("city", "Oslo")], []], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": column}), tmp_path / "rows.parquet")
    assert read_all(tmp_path / "rows.parquet") == [{"arguments": {"city": "Oslo"}}, {"arguments": {}}]


def odd_columns():
    fields = [pa.field("a", pa.int64()), pa.field("a", pa.string())]
    twice = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array(["x", "y"])], fields=fields)
    return {
        "a date beyond the year 9999": pa.array([10**12, 0], pa.timestamp("s")),
        "a time zone that there is not": pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus")),
        "an object with a field twice": twice,
        "days beyond the year 9999": pa.array([4_000_000, 0], pa.date32()),
        "a duration beyond Python's": pa.array([2**62, 0], pa.duration("s")),
        "bytes": pa.array([b"\xff", b"\0"], pa.binary()),
        "texts that are none": pa.array([b"\xff", b"a"], pa.binary()).view(pa.string()),
    }


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("odd", odd_columns())
def test_a_column_that_nobody_reads_does_not_matter(tmp_path, name, odd, prepare_run):
    table = pa.table({"odd": odd_columns()[odd], "text": ["one two", "three four"]})
    try:
        WRITERS[name](table, tmp_path / name)
    except pa.ArrowNotImplementedError:
        pytest.skip("a type that this kind of file has not")
    assert read_all(tmp_path / name, ["text"]) == [{"odd": None, "text": "one two"}, {"odd": None, "text": "three four"}]
    run = prepare_run(tmp_path / name, data="text")
    assert len(prepare(run.model, run.data, run.resources, kind="text").store) == 2


def test_a_column_that_nobody_reads_may_be_there_twice(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2]), pa.array(["a"])], names=["odd", "odd", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    write_arrow(table, tmp_path / "rows.arrow")
    for name in WRITERS:
        assert [row["text"] for row in read_all(tmp_path / name, ["text"])] == ["a"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("odd", ["a date beyond the year 9999", "a time zone that there is not", "an object with a field twice"])
def test_a_value_that_python_has_not_is_a_bad_row(tmp_path, name, odd):
    WRITERS[name](pa.table({"text": odd_columns()[odd]}), tmp_path / name)
    rows = read_all(tmp_path / name)
    assert len(rows) == 2 and any(isinstance(row, BadRow) for row in rows)


@pytest.mark.parametrize("name", WRITERS)
def test_texts_that_are_none_are_skipped_also_within_messages(tmp_path, name):
    contents = pa.array([b"Yes.", b"\xff\xfe", b"No."], pa.binary()).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], names=["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), messages)
    WRITERS[name](pa.table({"messages": column}), tmp_path / name)
    first, second, third = read_all(tmp_path / name)
    assert isinstance(second, BadRow)
    assert [row["messages"][0]["content"] for row in (first, third)] == ["Yes.", "No."]


def test_an_encrypted_footer_is_said(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    path.write_bytes(b"PARE" + path.read_bytes()[4:-4] + b"PARE")
    with pytest.raises(Exception, match=r"rows\.parquet: is not a parquet file"):
        read_all(path)


def test_rows_of_json_lines_are_as_they_are_written(tmp_path):
    row = {"messages": None, "tools": [{"default": None}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_all(tmp_path / "rows.jsonl") == [row]
