"""Files of every type, damaged at random: a command ends with exit code 2 and names the file, or skips rows and counts them."""

from __future__ import annotations

import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_llm.__main__ import main

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {number} é."},
            {"role": "assistant", "content": "Yes. " * (number % 5 + 1), "tool_calls": None},
        ],
        "number": number,
    }
    for number in range(40)
]


def as_arrow(opened, **options):
    table, stream = pa.Table.from_pylist(ROWS), io.BytesIO()
    with opened(stream, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=15)
    return stream.getvalue()


def as_parquet(**options):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream, row_group_size=15, **options)
    return stream.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
FILES = {
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "packed.arrow": as_arrow(pa.ipc.new_file, compression="lz4"),
    "a.parquet": as_parquet(),
    "plain.parquet": as_parquet(use_dictionary=False, compression="none"),
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
    "rows.json": json.dumps(ROWS).encode(),
}


def damaged(data, draw):
    data = bytearray(data)
    match draw.choice(["cut", "taken out", "overwritten", "bytes", "bytes", "repeated"]):
        case "cut":
            return bytes(data[: draw.randrange(len(data))])
        case "taken out":
            start = draw.randrange(len(data))
            del data[start : start + draw.randrange(1, 300)]
        case "overwritten":
            start = draw.randrange(len(data))
            part = data[start : start + draw.randrange(1, 64)]
            data[start : start + len(part)] = draw.randbytes(len(part))
        case "bytes":
            for _ in range(draw.choice([1, 2, 6])):
                data[draw.randrange(len(data))] = draw.choice([0, 255, draw.randrange(256)])
        case "repeated":
            start = draw.randrange(len(data))
            data[start:start] = data[start : start + 100]
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_ends_in_a_message_or_in_counted_rows(tmp_path, name, capsys):
    draw = random.Random(name)
    path = tmp_path / name
    for _ in range(12):
        path.write_bytes(damaged(FILES[name], draw))
        settings = [f"data.path={path}", f"data.cache={tmp_path / 'cache'}", "data.max_bad_fraction=0.9"]
        code = main(["prepare", "model=tiny_random", "data=chat", "resources=inline", *settings])
        said = capsys.readouterr().err
        assert code in (0, 2)
        if code == 2:
            assert said.startswith("error: ") and str(path) in said


def test_a_damaged_arrow_file_does_not_end_the_process(tmp_path):
    """Offsets of a text column that lead far out of its data: to read them is to read what is not there."""
    from raytune_llm.data.readers import sources
    from raytune_llm.errors import DataError

    table = pa.table({"text": ["one", "two", "three"] * 10})
    offsets = table["text"].chunk(0).buffers()[1].to_pybytes()
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    wild = bytearray(offsets)
    wild[40:44] = (1 << 30).to_bytes(4, "little")
    assert offsets in stream.getvalue()
    (tmp_path / "rows.arrow").write_bytes(stream.getvalue().replace(offsets, bytes(wild)))
    (chunk,) = sources.plan(sources.find(str(tmp_path / "rows.arrow")))
    with pytest.raises(DataError, match=r"rows\.arrow, after row 0: can't be read"):
        list(sources.read(chunk))
