"""Real rows through a dataset_info.json, end to end: files, formats, templates, tokens, truncation."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import Reading, converter
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.declarations import from_dataset_info
from raytune_llm.records import IGNORE
from tests.parity.llamafactory import DEMO, labels_of, recipe, recorded, rows_of

CASES: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
for case in recorded("demo_parity.jsonl"):
    CASES[case["dataset"], case["stage"], case["template"], case["cutoff_len"], json.dumps(case["args"])].append(case)


@pytest.mark.parametrize("cases", CASES.values(), ids=lambda cases: cases[0]["id"])
def test_demo_rows_have_the_recorded_tokens_and_labels(cases):
    first = cases[0]
    stage = first["stage"]
    [one] = from_dataset_info(str(DEMO), [first["dataset"]], media_dir=None, ranked=stage == "rm")
    convert = converter(one.format, Reading(media_dir=one.media_dir))
    rows = [row for chunk in sources.plan(sources.find(one.path)) for _, row in sources.read(chunk)]
    template = None if stage == "pt" else first["template"]
    ours = recipe(stage, template=template, max_length=first["cutoff_len"], **first["args"])
    for case, row in zip(cases, rows_of(ours, [convert(rows[case["row"]]) for case in cases]), strict=True):
        assert isinstance(row, BadRow) == case["dropped"], case["id"]
        for column, values in columns(stage, row).items():
            expected = case[column]
            digest = hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()[:16]
            trained = sum(value != IGNORE for value in values)
            assert (len(values), digest) == (expected["len"], expected["sha"]), (case["id"], column)
            assert trained == expected.get("trained", trained), (case["id"], column)


def columns(stage, row):
    if isinstance(row, BadRow):
        return {}
    if stage == "rm":
        return side("chosen_", row.prompt_ids, row.chosen_ids) | side("rejected_", row.prompt_ids, row.rejected_ids)
    if stage == "kto":
        return side("", row.prompt_ids, row.answer_ids)
    ids = row.ids.tolist()
    return {"input_ids": ids} if stage == "pt" else {"input_ids": ids, "labels": labels_of(ids, row.spans.tolist(), None)}


def side(prefix, prompt, answer):
    ids = [*prompt.tolist(), *answer.tolist()]
    return {f"{prefix}input_ids": ids, f"{prefix}labels": labels_of(ids, [len(prompt), len(ids)], None)}
