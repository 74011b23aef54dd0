"""Whole files through a dataset_info.json give the records that LLaMA-Factory loads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raytune_llm.data.formats import Reading, converter
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.declarations import from_dataset_info
from raytune_llm.data.samples import split
from raytune_llm.errors import DataError
from tests.parity.llamafactory import KIND_OF_STAGE, unified, wanted
from tests.parity.sets import recorded

CASES = {row["id"]: row for row in recorded("loader")}
RANDOM = {id for id in CASES if id.startswith(("interleave", "num_samples", "val_size"))}


def loaded(case, folder):
    for name, text in case["files"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "dataset_info.json").write_text(json.dumps(case["dataset_info"]))
    names = [name.strip() for name in case["dataset"].split(",")]
    records = []
    for one in from_dataset_info(str(folder), names, media_dir=None, ranked=KIND_OF_STAGE[case["stage"]] == "pairs"):
        convert = converter(one.format, Reading(media_dir=one.media_dir))
        chunks = sources.plan(
            sources.find(one.path), case["args"].get("max_samples"), part=one.split, num_samples=one.num_samples
        )
        records += [unified(convert(row)) for chunk in chunks for _, row in sources.read(chunk)]
    return records


def same(record, expected, case):
    """Without what LLaMA-Factory adds to system texts, or reads from the columns of other rows."""
    ignored = {"_system"} if "openai" in case["id"] else set()
    return {name: value for name, value in record.items() if name not in ignored} == {
        name: value for name, value in wanted(expected).items() if name in record and name not in ignored
    }


@pytest.mark.parametrize("id", sorted(CASES.keys() - RANDOM))
def test_files_give_the_recorded_records(id, tmp_path):
    case = CASES[id]
    if "error" in case["expected"]:
        with pytest.raises(DataError):
            loaded(case, tmp_path)
        return
    records, expected = loaded(case, tmp_path), case["expected"]["rows"]
    match id:
        case "csv_numbers":
            assert [record["_response"][0]["content"] for record in records] == ["5", "6"]
        case "directory":
            assert [record["_prompt"][0]["content"] for record in records] == ["A0", "A1", "B0", "B1"]
        case "openai_dict_arguments_merge":
            assert [record["_response"][0]["calls"][0]["arguments"] for record in records] == [{"x": 1}, {"y": "z"}]
        case "txt_pt":
            assert [record["_prompt"][0]["content"] for record in records] == ["line one", "line three"]
        case _:
            assert len(records) == len(expected)
            assert all(same(record, recorded, case) for record, recorded in zip(records, expected, strict=True))


@pytest.mark.parametrize("id", [id for id in CASES if id.startswith("num_samples")])
def test_so_many_rows_are_drawn_as_recorded(id, tmp_path):
    rows = [json.dumps(record) for record in loaded(CASES[id], tmp_path)]
    assert len(rows) == len(CASES[id]["expected"]["rows"])
    assert len(set(rows)) == len({json.dumps(row) for row in CASES[id]["expected"]["rows"]})


@pytest.mark.parametrize("id", [id for id in CASES if id.startswith("val_size")])
def test_as_many_rows_are_held_out_as_recorded(id, tmp_path):
    case = CASES[id]
    records, size = loaded(case, tmp_path), case["args"]["val_size"]
    trained, held_out = split(len(records), size if size < 1 else size / len(records), case["seed"])
    assert len(held_out) == (len(case["expected"]["validation"]) if "error" not in case["expected"] else 1)
    assert np.array_equal(np.sort(np.concatenate([trained, held_out])), np.arange(len(records)))


def test_a_data_set_that_is_listed_twice_is_there_twice(tmp_path):
    case = CASES["json_array"] | {"dataset": "x,x"}
    assert len(loaded(case, tmp_path)) == 2 * len(CASES["json_array"]["expected"]["rows"])
