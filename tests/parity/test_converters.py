"""Raw rows become the records that LLaMA-Factory makes of them."""

from __future__ import annotations

import pytest

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import Reading, convert
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.readers.declarations import _format
from raytune_llm.errors import DataError
from tests.parity.llamafactory import KIND_OF_STAGE, recipe, rows_of, unified, wanted
from tests.parity.sets import recorded

ROWS = {row["id"]: row for row in recorded("converters")}
REFUSED = {
    "alpaca/missing_output_key": BadRow,
    "alpaca/columns_named_missing": BadRow,
    "alpaca/ranking_list_chosen": BadRow,  # recorded without a response, and dropped later
    "openai/unknown_role": BadRow,
    "sharegpt/messages_column_default_dropped": DataError,
}
OURS = {
    # What the README of the recordings asks for in place of each defect that changes more than a system text.
    "alpaca/missing_query_key": {"_response": [{"role": "assistant", "content": "hi"}]},
    "openai/tool_calls_text_dropped": {
        "_prompt": [
            {"role": "user", "content": "q"},
            {"role": "function", "content": "Let me look.", "calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "observation", "content": "1"},
        ]
    },
    "openai/parallel_tool_results": {
        "_prompt": [
            {"role": "user", "content": "q"},
            {
                "role": "function",
                "content": "",
                "calls": [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}],
            },
            {"role": "observation", "content": "1"},
            {"role": "observation", "content": "2"},
        ]
    },
    "openai/trailing_tool_results_ranking": {
        "_prompt": [
            {"role": "user", "content": "q"},
            {"role": "function", "content": "", "calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "observation", "content": "1"},
        ],
        "_response": [{"role": "assistant", "content": "g"}, {"role": "assistant", "content": "b"}],
    },
}  # fmt: skip


def converted(row, tmp_path):
    media = tmp_path / row["media_dir"]
    for name in row["media_files_present"]:
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).touch()
    return convert(row["row"], _format("rows", row["dataset_info"]), Reading(media_dir=row["media_dir"]))


@pytest.mark.parametrize("id", ROWS)
def test_a_row_becomes_the_record_that_is_recorded(id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = ROWS[id]
    if id in REFUSED or (row.get("rejected") and id not in OURS):
        with pytest.raises(REFUSED.get(id, BadRow)):
            converted(row, tmp_path)
        return
    expected = {} if "error" in row["expected"] else wanted(row["expected"])
    if row["format"] == "openai":
        first = row["row"]["messages"][0] if "messages" in row["row"] else {}
        expected["_system"] = first["content"] if first.get("role") == "system" else ""
    expected |= OURS.get(id, {})
    assert {name: value for name, value in unified(converted(row, tmp_path)).items() if name in expected} == expected


SKIPPED = {"alpaca/ranking_empty_rejected": {"rm"}, "alpaca/kto_true_empty_output": {"kto"}}
"""An empty answer is no preference: it is skipped and counted here, where LLaMA-Factory trains on its end token alone."""


@pytest.mark.parametrize("id", [id for id, row in ROWS.items() if row.get("then") and id not in OURS and not row.get("rejected")])
def test_each_stage_keeps_the_rows_that_are_recorded_as_kept(id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = ROWS[id]
    for stage, then in row["then"].items():
        preprocessor = recipe(stage, template=None if stage == "pt" else "chatml")
        try:
            record = converted(row, tmp_path)
        except BadRow:
            assert then == "dropped"
            continue
        (made,) = rows_of(preprocessor, [record])
        kept = not isinstance(made, Exception)
        usable_here = id == "sharegpt/tools_list_value" and stage in ("sft", "ppo")
        skipped_here = stage in SKIPPED.get(id, ())
        assert (stage, kept) == (stage, (then == "kept" and not skipped_here) or usable_here)
    assert KIND_OF_STAGE.keys() >= row["then"].keys() and set(KIND_OF_STAGE.values()) == set(KINDS)
