"""conf/data/ names data sets of the hub. A row with the columns that each is published with becomes what is to be learned.

public_rows.json has such a row of each, with contents of our own; columns and splits are those of the data sets' cards.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm.config.data import DataConfig
from raytune_llm.config.load import compose, load_config
from raytune_llm.config.options import options
from raytune_llm.data.formats import convert
from raytune_llm.data.readers.sources import find
from raytune_llm.records import Labeled, Pair, Text

ROWS = json.loads(Path(__file__).with_name("public_rows.json").read_text())


def data_set(name: str) -> DataConfig:
    return load_config("prepare", ["model=tiny_random", f"data={name}"]).data


def learned(name: str) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.content, turn.trained) for turn in convert(ROWS[name], data_set(name).format).messages]


def test_every_data_set_of_the_hub_has_a_row_here():
    paths = {name: compose("prepare", ["model=tiny_random", f"data={name}"]).data.path for name in options("data")}
    assert {name for name, path in paths.items() if path is not None and find(path).kind == "hub"} == ROWS.keys()


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("alpaca_cleaned", [("user", "Name the colour.\nthe sky at noon", False), ("assistant", "Blue.", True)]),
        ("dolly_15k", [("user", "Who wrote it?\nAda wrote the letter.", False), ("assistant", "Ada.", True)]),
        ("slimorca", [("system", "Be brief.", False), ("user", "Is ice cold?", False), ("assistant", "Yes.", True)]),
        ("tulu3_sft", [("user", "Add 2 and 2.", False), ("assistant", "4", True)]),
        (
            "ultrachat_200k",
            [
                ("user", "Name a bird.", False),
                ("assistant", "A wren.", True),
                ("user", "Another.", False),
                ("assistant", "A lark.", True),
            ],
        ),
        (
            "gsm8k",
            [
                ("user", "Tom has 2 pens and buys 3. How many has he?", False),
                ("assistant", "2 + 3 = <<2+3=5>>5\n#### 5", True),
            ],
        ),
    ],
)
def test_conversations_are_read_from_the_columns_that_are_published(name, turns):
    assert learned(name) == turns


def test_pairs_are_read_from_the_columns_that_are_published():
    pair = convert(ROWS["ultrafeedback_binarized"], data_set("ultrafeedback_binarized").format)
    assert isinstance(pair, Pair)
    assert [turn.content for turn in (*pair.prompt.messages, *pair.chosen, *pair.rejected)] == ["Say hello.", "Hello!", "No."]


def test_verdicts_are_read_from_the_columns_that_are_published():
    answer = convert(ROWS["kto_mix_14k"], data_set("kto_mix_14k").format)
    assert isinstance(answer, Labeled) and answer.desirable
    assert [turn.content for turn in answer.conversation.messages] == ["Name a fish.", "A trout."]


@pytest.mark.parametrize("name", ["fineweb_edu", "wikitext"])
def test_texts_are_read_from_the_column_that_is_published(name):
    assert convert(ROWS[name], data_set(name).format) == Text(ROWS[name]["text"])


@pytest.mark.parametrize(
    ("name", "subset", "split"),
    [
        ("ultrachat_200k", None, "train_sft"),
        ("ultrafeedback_binarized", None, "train_prefs"),
        ("gsm8k", "main", "train"),
        ("fineweb_edu", "sample-10BT", "train"),
        ("wikitext", "wikitext-103-raw-v1", "train"),
    ],
)
def test_the_subset_and_the_split_are_those_to_train_on(name, subset, split):
    data = data_set(name)
    assert (data.subset, data.split) == (subset, split)


def test_the_blank_lines_of_wikitext_are_no_reason_to_stop():
    assert data_set("wikitext").max_bad_fraction > 1 / 3
