"""Rows, dataset_info.json and folders with something odd in a random place: exit code 0 with every row there or counted, or exit
code 2 and a message that names the file. Never a traceback, never a row that is lost without a word."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_llm.__main__ import main

ASK, SAY = {"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "It is."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}]
RESULT = {"role": "tool", "tool_call_id": "a", "content": "7"}
HUMAN, GPT = {"from": "human", "value": "Is it warm?"}, {"from": "gpt", "value": "It is."}
REFUSAL = {**GPT, "value": "No."}
PAIR = {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No."}]}
GOOD: dict[str, tuple[list[str], dict[str, Any]]] = {
    "chat": (["data=chat"], {"messages": [ASK, SAY, ASK, SAY]}),
    "verdicts": (["data=chat_labeled", "stage=kto"], {"messages": [ASK, SAY], "label": True}),
    "tools": (
        ["data=chat", "data.template=qwen"],
        {"messages": [ASK, CALL, {"role": "tool", "content": "7"}, SAY], "tools": TOOLS},
    ),
    "chat_pairs": (["data=chat_pairs", "stage=dpo"], PAIR),
    "alpaca": (["data=alpaca"], {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]}),
    "alpaca_pairs": (["data=alpaca_pairs", "stage=orpo"], {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}),
    "sharegpt": (["data=sharegpt"], {"conversations": [HUMAN, GPT], "system": "s", "tools": "[]"}),
    "sharegpt_pairs": (["data=sharegpt_pairs", "stage=reward"], {"conversations": [HUMAN], "chosen": GPT, "rejected": REFUSAL}),
    "openai": (["data=openai"], {"messages": [ASK, SAY]}),
    "prompt_completion": (["data=prompt_completion"], {"prompt": "a", "completion": "b"}),
    "text": (["data=text", "stage=pretrain"], {"text": "It is warm."}),
}
ODD: list[Any] = [
    None, True, 0, -1, 7.5, float("nan"), float("inf"), 10**400, "", " ", "\0", "\ud83d", "[/b]", "<|im_end|>", "x" * 3000, [],
    {}, [None], [[]], [1, 2], {"a": None}, {"role": "user"}, "[{]", "[]", "{}", "data:image/png;base64," + "A" * 999,
]  # fmt: skip
KEYS = ["weight", "loss", "train", "name", "tool_calls", "tools", "images", "type", "reasoning_content", "margin", "", "é", "id"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a row."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(item)


def made_odd(row: Any, draw: random.Random) -> Any:
    """The row with one or two of its values changed, taken away, said twice or joined by another."""
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 2)):
        container, key = draw.choice(list(places(row)) or [({}, "")])
        match draw.randrange(5):
            case 2 if container:
                del container[key]
            case 3 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 4 if isinstance(container, dict):
                container[draw.choice(KEYS)] = copy.deepcopy(draw.choice(ODD))
            case _:
                container[key] = copy.deepcopy(draw.choice(ODD))
    return row


def prepared(capsys: pytest.CaptureFixture[str], cache: Path, *settings: str) -> tuple[int | None, str]:
    """The rows that are there or were dropped, or none and the error."""
    common = ["model=tiny_random", "resources=inline", "data.max_bad_fraction=1", f"data.cache={cache}"]
    code = main(["prepare", *common, *settings])
    said = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert not list(cache.glob("*/manifest.json"))
        return None, said.err
    (manifest,) = (json.loads(path.read_text()) for path in cache.glob("*/manifest.json"))
    return manifest["rows"] + sum(dropped["rows"] for dropped in manifest["dropped"].values()), said.out


@pytest.mark.parametrize("form", GOOD)
def test_odd_rows_are_used_or_counted(capsys, tmp_path: Path, form: str):
    draw = random.Random(f"{form} 0")
    settings, good = GOOD[form]
    rows = [good] * 3 + [made_odd(good, draw) for _ in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_rows, said = prepared(capsys, tmp_path / "cache", *settings, f"data.path={path}")
    assert num_rows == len(rows) or (num_rows is None and re.search(r"rows\.jsonl, row \d+: ", said)), said


ENTRIES: list[dict[str, Any]] = [
    {"file_name": "alpaca.json"},
    {"file_name": "alpaca.json", "columns": {"prompt": "instruction", "response": "output"}, "num_samples": 2},
    {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
     "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_an_odd_dataset_info_is_read_or_named(capsys, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 4))
    (tmp_path / "talks.json").write_text(json.dumps([{"messages": [ASK, SAY]}] * 4))
    entry = made_odd(draw.choice(ENTRIES), draw)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    settings = ("data=alpaca", f"data.dataset_info={tmp_path}", "data.names=[x]")
    num_rows, said = prepared(capsys, tmp_path / "cache", *settings)
    assert num_rows == (entry.get("num_samples") or 4) or (num_rows is None and str(tmp_path) in said), said


BESIDE: dict[str, bytes | None] = {
    "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT", ".gitattributes": b"*", "c.parquet": b"no parquet",
    "b.jsonl": json.dumps({"messages": [ASK, SAY]}).encode(), "d.csv": b"a,b\n1,2\n", "sub/f.parquet": None, "g.xlsx": b"PK",
    "h.parquet": None, "i.parquet.gz": b"\x1f\x8b", "notes.md": b"hm", "e.parquet": b"", "dataset_infos.json": b"{}",
}  # fmt: skip
"""Files of a folder; none is a parquet of two rows."""


@pytest.mark.parametrize("seed", range(8))
def test_all_files_of_a_folder_are_read_or_one_is_named(capsys, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    folder, expected = tmp_path / "rows", 0
    for name in ["a.parquet", *draw.sample(sorted(BESIDE), draw.randint(1, 3))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (content := BESIDE.get(name)) is None:
            pq.write_table(pa.table({"messages": [[ASK, SAY]] * 2}), folder / name)
            expected += 2
        else:
            (folder / name).write_bytes(content)
    num_rows, said = prepared(capsys, tmp_path / "cache", "data=chat", f"data.path={folder}")
    assert num_rows == expected or (num_rows is None and str(folder) in said), said
