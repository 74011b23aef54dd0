"""Training files with something odd in a random place: an experiment, or exit code 2, a reason and nothing written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_llm.__main__ import main
from raytune_llm.migrate.arguments import ARGUMENTS

GOOD: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "stage": "sft", "do_train": True, "finetuning_type": "lora",
    "dataset": "identity", "template": "llama3", "cutoff_len": 128, "output_dir": "out", "learning_rate": 1e-4,
    "deepspeed": "ds.json",
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 7.5, float("nan"), float("inf"), 10**400, "", " ", "x", "é", "/", "/proc", "..", "a,b", "[1",
    "1e999", [], [None], [[]], [1, 2], {}, {"a": None}, {1: 2}, "a" * 3000,
    {"zero_optimization": {"stage": "x"}}, {"zero_optimization": []},
]  # fmt: skip
KEYS: list[Any] = [None, 1, True, "", "é", "x.y", "model.path", "defaults", 2.5]
CUTS = [
    b"\t",
    b"\xff",
    b"\0",
    b"&a ",
    b"*a ",
    b"<<: ",
    b"- ",
    b"{",
    b"[",
    b"? ",
    b"---\n",
    b"%YAML 9\n",
    b"'",
    b"!!set ",
    b"!!bool ",
]
FILES = [
    b"", b"[]", b"3", b"\xff\xfe", b"&a [*a]", b"a: &a [*a]", b"a: &a {b: *a}", b"a: " + b"[" * 3000, b"a: b: c", b"? [a]\n: b\n",
    b"a: !!timestamp x", b"a: 2024-99-99", b"a: !!int x", b"a: !!bool x", b"a: !!binary '#'", b"a: 1e\n", b"=: 1", b"<<: 3",
]  # fmt: skip
LINES = [[], ["name=x"], ["world_size=2"], ["config_dir=mine.yaml"], ["dataset_info=nothing"], ["dataset_info=ds.json"]]


def odd_arguments(draw: random.Random) -> bytes:
    arguments = dict(GOOD)
    for _ in range(draw.randint(1, 3)):
        match draw.randrange(6):
            case 0 if arguments:
                del arguments[draw.choice(list(arguments))]
            case 1:
                arguments[draw.choice(KEYS)] = draw.choice(ODD)
            case _:
                arguments[draw.choice(list(ARGUMENTS))] = draw.choice(ODD)
    return yaml.safe_dump(arguments, allow_unicode=True).encode()


def damaged(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    match draw.randrange(3):
        case 0:
            return content[:at] + content[at + draw.randint(1, 20) :]
        case 1:
            return content[:at] + draw.choice(CUTS) + content[at:]
        case _:
            return content[:at]


def check(folder: Path, content: bytes, capsys: pytest.CaptureFixture[str], *line: str) -> None:
    (folder / "mine.yaml").write_bytes(content)
    code = main(["import", "mine.yaml", *line])
    told = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in told.err, content
    if code == 2:
        assert told.err.strip(), content
        assert not (folder / "conf").exists(), content


@pytest.fixture
def here(factory: Path) -> Path:
    (factory / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return factory


@pytest.mark.parametrize("content", FILES)
def test_files_of_another_kind(content: bytes, here: Path, capsys):
    check(here, content, capsys)


@pytest.mark.parametrize("line", LINES)
def test_commands_with_something_that_is_not_there(line: list[str], here: Path, capsys):
    check(here, yaml.safe_dump(GOOD).encode(), capsys, *line)


@pytest.mark.parametrize("seed", range(40))
def test_odd_arguments_and_damaged_bytes(seed: int, here: Path, capsys):
    draw = random.Random(seed)
    content = odd_arguments(draw)
    check(here, damaged(content, draw) if seed % 2 else content, capsys)
