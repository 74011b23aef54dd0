"""Records become the ids and labels that LLaMA-Factory makes of them, with SmolLM2's tokenizer."""

from __future__ import annotations

import pytest

from raytune_llm.data.dropped import BadRow
from tests.parity.llamafactory import labels_of, recipe_for, record_of, rows_of, template_of
from tests.parity.sets import recorded

CASES = {row["id"]: row for row in recorded("labels")}
PACKED = {id for id, row in CASES.items() if "packing" in id and row["stage"] != "pt"}


def of_stage(*stages):
    return [id for id, row in CASES.items() if row["stage"] in stages and "defect" not in row and id not in PACKED]


def made(row):
    ours = recipe_for(row)
    return ours, rows_of(ours, [record_of(record, row["stage"], template_of(row["stage"], ours)) for record in row["records"]])


@pytest.mark.parametrize("id", of_stage("sft"))
def test_conversations_have_the_recorded_labels(id):
    recipe, rows = made(CASES[id])
    expected = [(row["input_ids"], row["labels"]) for row in CASES[id]["expected"]]
    kept = [row for row in rows if not isinstance(row, BadRow)]
    assert [
        (row.ids.tolist(), labels_of(row.ids.tolist(), row.spans.tolist(), recipe.targets.end_of_row)) for row in kept
    ] == expected


@pytest.mark.parametrize("id", of_stage("rm"))
def test_pairs_have_the_recorded_labels(id):
    _, [row] = made(CASES[id])
    for side, answer in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
        expected = CASES[id]["expected"][0]
        ids = [*row.prompt_ids.tolist(), *answer.tolist()]
        assert ids == expected[f"{side}_input_ids"]
        assert labels_of(ids, [len(row.prompt_ids), len(ids)], None) == expected[f"{side}_labels"]


@pytest.mark.parametrize("id", of_stage("kto"))
def test_labelled_answers_have_the_recorded_labels(id):
    _, rows = made(CASES[id])
    for row, expected in zip(rows, CASES[id]["expected"], strict=True):
        ids = [*row.prompt_ids.tolist(), *row.answer_ids.tolist()]
        assert (ids, row.desirable) == (expected["input_ids"], expected["kto_tags"])
        assert labels_of(ids, [len(row.prompt_ids), len(ids)], None) == expected["labels"]


@pytest.mark.parametrize("id", of_stage("predict", "ppo"))
def test_prompts_are_those_recorded(id):
    _, rows = made(CASES[id])
    for row, expected in zip(rows, CASES[id]["expected"], strict=True):
        answer = row.answer_ids.tolist()
        assert row.prompt_ids.tolist() == expected["input_ids"]
        assert answer == expected["labels"] or id == "predict/two_responses"


@pytest.mark.parametrize("id", of_stage("pt"))
def test_texts_are_those_recorded(id):
    row = CASES[id]
    _, rows = made(row)
    if "no_packing" in id:
        assert [row.ids.tolist() for row in rows] == [row["input_ids"] for row in row["expected"]]
        return
    end_to_end = [token for text in rows for token in text.ids.tolist()]
    blocks = [token for block in row["expected"] for token in block["input_ids"]]
    assert end_to_end[: len(blocks)] == blocks, "and here the tail comes after that"


@pytest.mark.parametrize(
    "id", [id for id, row in CASES.items() if "defect" in row and row["stage"] == "sft" and id not in PACKED]
)
def test_rows_with_a_defect_have_trained_tokens_or_are_dropped(id):
    recipe, rows = made(CASES[id])
    for row in rows:
        if isinstance(row, BadRow):
            assert CASES[id]["cutoff_len"] <= 4
        else:
            assert set(labels_of(row.ids.tolist(), row.spans.tolist(), recipe.targets.end_of_row)) != {-100}
