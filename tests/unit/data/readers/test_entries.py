"""Entries of a dataset_info.json: what nobody would read is refused, with what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers.declarations import from_dataset_info
from raytune_llm.errors import DataError, UserError

SHARED = Path(__file__).resolve().parents[5] / "shared"

ENTRY = {"file_name": "a.jsonl"}
PAIRS = {"ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}}


def refused(tmp_path, entry, *, ranked=False):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": {**ENTRY, **entry}}))
    with pytest.raises(DataError) as error:
        from_dataset_info(str(tmp_path), ["one"], media_dir=None, ranked=ranked)
    assert str(tmp_path / "dataset_info.json") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"max_samples": 10}, "max_samples is an unknown key. Did you mean num_samples?"),
        ({"system_prompt": "Be brief."}, "system_prompt is an unknown key. Did you mean columns.system?"),
        ({"format": "sharegpt"}, "format is an unknown key. Did you mean formatting?"),
        ({"formating": "sharegpt"}, "Did you mean formatting?"),
        ({"split_": "train"}, "Did you mean split?"),
        ({"colums": {}}, "colums is an unknown key. Did you mean columns?"),
        ({"banana": 1}, "banana is an unknown key. There are: file_name"),
        ({"num_samples": True}, "num_samples must be a positive number, got True"),
        ({"num_samples": 1.5}, "num_samples must be a positive number, got 1.5"),
        ({"ranking": "true"}, "ranking must be true or false, got 'true'"),
        (
            {"columns": {"prompt": "p", "input": "q"}},
            "columns.input is an unknown key with the formatting alpaca. Did you mean query?",
        ),
        ({"columns": {"prompt": "p", "output": "q"}}, "Did you mean response?"),
        ({"columns": {"prompt": "p", "messages": "q"}}, "columns.messages is an unknown key with the formatting alpaca"),
        ({"formatting": "sharegpt", "columns": {"messages": "m", "prompt": "p"}}, "with the formatting sharegpt"),
        ({"formatting": "sharegpt", "columns": {"mesages": "m"}}, "Did you mean messages?"),
        ({"formatting": "sharegpt", "tags": {"role": "r"}}, "tags.role is an unknown key. Did you mean role_tag?"),
        ({"formatting": "sharegpt", "tags": {"user": "r"}}, "Did you mean user_tag?"),
        ({"tags": {"user_tag": "r"}}, "has tags, which formatting alpaca does not use"),
        ({"formatting": "chatml"}, "has the formatting 'chatml'; there are alpaca, sharegpt, openai"),
        ({"columns": {"prompt": "p", "chosen": "c"}}, "names columns.chosen, which only rows with ranking: true have"),
    ],
)
def test_a_key_that_nobody_reads_is_refused_with_the_one_that_was_meant(tmp_path, entry, said):
    assert said in refused(tmp_path, entry)


def test_pairs_say_their_columns_and_have_no_verdict_beside(tmp_path):
    said = refused(tmp_path, {"ranking": True, "columns": {"prompt": "p", "chosen": "c"}}, ranked=True)
    assert "has ranking: true and no columns for chosen and rejected" in said
    columns = {**PAIRS["columns"], "kto_tag": "k"}
    assert "ranking: true and a kto_tag" in refused(tmp_path, {**PAIRS, "columns": columns}, ranked=True)


def test_keys_of_entries_that_are_not_used_and_older_files_are_let_be(tmp_path):
    entries = {"one": {**ENTRY, "file_sha1": "abc", "subset": None}, "two": {"banana": 1}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    assert from_dataset_info(str(tmp_path), ["one"], media_dir=None, ranked=False)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the demo data are in the maintainers' shared folder, which is not here")
def test_every_entry_of_the_demo_data_is_read():
    entries = json.loads((SHARED / "data" / "dataset_info.json").read_text())
    for name, entry in entries.items():
        assert from_dataset_info(str(SHARED / "data"), [name], media_dir=None, ranked=bool(entry.get("ranking")))


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_declaration_of_any_depth_is_refused(tmp_path, depth):
    (tmp_path / "dataset_info.json").write_text('{"a": ' * depth + "1" + "}" * depth)
    with pytest.raises(UserError):
        from_dataset_info(str(tmp_path), ["a"], media_dir=None, ranked=False)


@pytest.mark.parametrize("missing", ["nothing.jsonl", "nothing", "owner/nothing"])
def test_a_missing_file_is_blamed_on_its_entry(tmp_path, prepare_run, missing):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": {"file_name": missing}}))
    run = prepare_run("null", f"data.dataset_info={tmp_path}", "data.names=[one]")
    with pytest.raises(DataError, match=r"no such file or folder\. Check file_name of one in .*dataset_info\.json\.$"):
        prepare(run.model, run.data, run.resources)


def test_a_split_that_an_entrys_file_has_not_is_refused(tmp_path, prepare_run):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    entry = {"file_name": "rows.jsonl", "split": "banana"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": entry}))
    run = prepare_run("null", f"data.dataset_info={tmp_path}", "data.names=[one]")
    with pytest.raises(DataError, match="has no split 'banana'"):
        prepare(run.model, run.data, run.resources)
