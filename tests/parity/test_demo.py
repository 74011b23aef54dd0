"""Rows through a dataset_info.json, end to end: files, formats, templates, tokens, truncation.

LLaMA-Factory's demo data are not ours to keep: they are read where they lie beside the checkout. Conversations of our own are
written to files, anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import Reading, converter
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.declarations import from_dataset_info
from tests.parity import sets
from tests.parity.llamafactory import IGNORE, labels_of, recipe, recipe_for, rows_of

DEMO = sets.FULL.parent / "data"
CASES: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
for case in sets.recorded("demo_parity") if DEMO.is_dir() else ():
    CASES[case["dataset"], case["stage"], case["template"], case["cutoff_len"], json.dumps(case["args"])].append(case)


def records_of(folder: Path, dataset: str, *, ranked: bool) -> list[Any]:
    [one] = from_dataset_info(str(folder), [dataset], media_dir=None, ranked=ranked)
    convert = converter(one.format, Reading(media_dir=one.media_dir))
    return [convert(row) for chunk in sources.plan(sources.find(one.path)) for _, row in sources.read(chunk)]


NOT_HERE = pytest.param([], marks=pytest.mark.skip(reason="LLaMA-Factory's demo data are not beside this checkout"), id="none")


@pytest.mark.parametrize("cases", [pytest.param(cases, id=cases[0]["id"]) for cases in CASES.values()] or [NOT_HERE])
def test_demo_rows_have_the_recorded_tokens_and_labels(cases):
    first = cases[0]
    stage = first["stage"]
    records = records_of(DEMO, first["dataset"], ranked=stage == "rm")
    template = None if stage == "pt" else first["template"]
    ours = recipe(stage, template=template, max_length=first["cutoff_len"], **first["args"])
    for case, row in zip(cases, rows_of(ours, [records[case["row"]] for case in cases]), strict=True):
        assert isinstance(row, BadRow) == case["dropped"], case["id"]
        for column, values in columns(stage, row).items():
            expected = case[column]
            digest = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()[:16]
            assert (len(values), digest) == (expected["len"], expected["sha"]), (case["id"], column)
            if column.endswith("labels"):
                assert sum(value != IGNORE for value in values) == expected["trained"], (case["id"], column)


FILES = {"sft": "conversations", "rm": "pairs", "kto": "verdicts", "pt": "texts"}
"""What the file of a stage's rows is called."""
OUR_OWN = {
    row["id"]: row
    for row in sets.recorded("labels")
    if row["stage"] in FILES and "defect" not in row and "packing" not in row["id"].replace("no_packing", "")
}
NAMES = {"user": "human", "assistant": "gpt", "function": "function_call", "observation": "observation"}


@pytest.mark.parametrize("id", OUR_OWN)
def test_rows_of_a_file_have_the_recorded_tokens_and_labels(id, tmp_path):
    case = OUR_OWN[id]
    stage = case["stage"]
    (tmp_path / "rows.json").write_text(json.dumps([written(record, stage) for record in case["records"]]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({FILES[stage]: declaration(stage)}))
    ours = recipe_for(case)
    rows = rows_of(ours, records_of(tmp_path, FILES[stage], ranked=stage == "rm"))
    kept = [columns(stage, row, ours.targets.end_of_row) for row in rows if not isinstance(row, BadRow)]
    assert kept == [{name: expected[name] for name in kept[0]} for expected in case["expected"]]


def written(record, stage):
    """As a row of a file, in the form that names its speakers."""

    def turn(message):
        return {"from": NAMES[message["role"]], "value": message["content"]}

    if stage == "pt":
        return {"text": record["_prompt"][0]["content"]}
    prompt, responses = ([turn(message) for message in record[part]] for part in ("_prompt", "_response"))
    row = {"system": record["_system"], "tools": record["_tools"]}
    if stage == "rm":
        return row | {"conversations": prompt, "chosen": responses[0], "rejected": responses[1]}
    desirable = bool(record["_response"][0]["content"])
    row["conversations"] = [*prompt, responses[0 if desirable else 1]]
    return row | {"liked": desirable} if stage == "kto" else row


def declaration(stage):
    if stage == "pt":
        return {"file_name": "rows.json", "columns": {"prompt": "text"}}
    named = {"sft": {}, "rm": {"chosen": "chosen", "rejected": "rejected"}, "kto": {"kto_tag": "liked"}}[stage]
    columns = {"messages": "conversations", "system": "system", "tools": "tools", **named}
    return {"file_name": "rows.json", "formatting": "sharegpt", "ranking": stage == "rm", "columns": columns}


def columns(stage, row, end_of_row=None):
    if isinstance(row, BadRow):
        return {}
    if stage == "rm":
        return side("chosen_", row.prompt_ids, row.chosen_ids) | side("rejected_", row.prompt_ids, row.rejected_ids)
    if stage == "kto":
        return side("", row.prompt_ids, row.answer_ids)
    ids = row.ids.tolist()
    return {"input_ids": ids} if stage == "pt" else {"input_ids": ids, "labels": labels_of(ids, row.spans.tolist(), end_of_row)}


def side(prefix, prompt, answer):
    ids = [*prompt.tolist(), *answer.tolist()]
    return {f"{prefix}input_ids": ids, f"{prefix}labels": labels_of(ids, [len(prompt), len(ids)], None)}
