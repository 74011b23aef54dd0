from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def conversations():
    lines = (EXAMPLES / "commands.jsonl").read_text(encoding="utf-8").splitlines()
    return [[(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]] for line in lines]


def test_the_script_makes_the_committed_file_byte_for_byte():
    made = subprocess.run([sys.executable, EXAMPLES / "make_commands.py"], capture_output=True, check=True).stdout
    assert made == (EXAMPLES / "commands.jsonl").read_bytes()


def test_every_row_asks_once_and_answers_once(conversations):
    assert len(conversations) == 1100
    assert {tuple(role for role, _ in turns) for turns in conversations} == {("system", "user", "assistant")}


def test_no_two_rows_share_a_request_or_a_command(conversations):
    assert len({turns[1][1] for turns in conversations}) == len(conversations)
    assert len({turns[2][1] for turns in conversations}) == len(conversations)


def test_every_answer_is_one_compact_json_command(conversations):
    for _, _, (_, answer) in conversations:
        command = json.loads(answer)
        assert json.dumps(command, separators=(",", ":")) == answer
        assert next(iter(command)) == "action"


def test_times_are_written_in_24_hours(conversations):
    said = {turns[1][1]: json.loads(turns[2][1]).get("time") for turns in conversations}
    assert {time[:2] for request, time in said.items() if " pm" in request and time} <= {str(hour) for hour in range(12, 23)}
    assert {time[:2] for request, time in said.items() if " am" in request and time} <= {f"{hour:02}" for hour in range(6, 12)}
    assert all(time == "12:00" for request, time in said.items() if "noon" in request.split())
