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


MADE = sorted(script.stem.removeprefix("make_") for script in EXAMPLES.glob("make_*.py"))


def rows(name):
    return [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_file_of_rows_has_its_script():
    assert sorted(file.stem for file in EXAMPLES.glob("*.jsonl")) == MADE


@pytest.mark.parametrize("name", MADE)
def test_the_script_makes_the_committed_file_byte_for_byte(name):
    made = subprocess.run([sys.executable, EXAMPLES / f"make_{name}.py"], capture_output=True, check=True).stdout
    assert made == (EXAMPLES / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", MADE)
def test_there_are_rows_enough_to_learn_from(name):
    assert len(rows(name)) >= 300


def test_every_pair_has_a_better_command_and_something_worse():
    for row in rows("pairs"):
        better, worse = row["chosen"]["value"], row["rejected"]["value"]
        assert better != worse
        assert json.dumps(json.loads(better), separators=(",", ":")) == better


def test_what_the_home_cannot_do_it_refuses_with_a_reason_or_asks_back():
    actions = [json.loads(row["chosen"]["value"])["action"] for row in rows("pairs")]
    assert actions.count("refuse") == actions.count("ask") == len(actions) / 6


def test_half_of_the_verdicts_are_good_and_all_good_answers_are_commands():
    verdicts = rows("verdicts")
    assert sum(row["label"] for row in verdicts) == len(verdicts) / 2
    assert all(json.loads(row["messages"][-1]["content"])["action"] for row in verdicts if row["label"])


def test_no_request_is_in_two_files(conversations):
    commands = [turns[1][1] for turns in conversations]
    pairs = [row["conversations"][0]["value"] for row in rows("pairs")]
    verdicts = [row["messages"][1]["content"] for row in rows("verdicts")]
    everything = commands + pairs + verdicts
    assert len(set(everything)) == len(everything)


def test_the_alpaca_rows_are_the_first_commands(conversations):
    for row, turns in zip(rows("alpaca"), conversations, strict=False):
        assert [row["system"], row["instruction"], row["output"]] == [content for _, content in turns]


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
