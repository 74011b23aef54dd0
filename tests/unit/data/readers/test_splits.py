"""Which files of a folder are which split, as the hub has it; and parts of splits."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.declarations import check_held_out
from raytune_llm.data.readers.splits import splits_of
from raytune_llm.errors import ConfigError, DataError

LINE = '{"text": "%s"}\n'


def write(folder, *names):
    """Files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE % name)


def texts(path, split="train", **settings):
    source = sources.find(str(path), split=split, **settings)
    return [row["text"] for chunk in sources.plan(source, part=split) for _, row in sources.read(chunk)]


FOLDERS = {
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "shards of other names": ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
    "files": ["train.jsonl", "validation.jsonl", "test.jsonl"],
    "files with other words": ["my-train-set.jsonl", "my_dev_set.jsonl", "x.eval.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "testing/a.jsonl", "val_2/x/a.jsonl"],
    "no words": ["a.jsonl", "b.jsonl", "sub/c.jsonl"],
    "words within words": ["trained.jsonl", "latest.jsonl", "development.jsonl"],
    "some words": ["train.jsonl", "more.jsonl"],
}


@pytest.mark.parametrize("names", FOLDERS.values(), ids=list(FOLDERS))
def test_a_folder_has_the_splits_that_the_hub_gives_it(tmp_path, names):
    write(tmp_path, *names)
    assert {split: set(files) for split, files in splits_of(names).items()} == of_the_hub(tmp_path)


def of_the_hub(folder):
    files = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    return {str(split): {str(file)[len(str(folder)) + 1 :] for file in found} for split, found in files.items()}


WORD = st.sampled_from(["train", "test", "dev", "val", "eval", "data", "a", "training", "0", "Train", "best"])
PART = st.lists(WORD, min_size=1, max_size=3).flatmap(
    lambda words: st.sampled_from(["-", "_", ".", " ", "1", ""]).map(lambda edge: edge.join(words))
)
NAME = st.lists(PART, min_size=1, max_size=3).map("/".join).map(lambda name: f"{name}.jsonl")


@settings(max_examples=60)
@given(names=st.sets(NAME, min_size=1, max_size=5))
def test_any_folder_has_the_splits_that_the_hub_gives_it(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("set")
    write(folder, *sorted(names))
    assert {split: set(files) for split, files in splits_of(sorted(names)).items()} == of_the_hub(folder)


def test_a_split_is_read_from_its_files_alone(tmp_path):
    write(tmp_path, *FOLDERS["shards"])
    assert texts(tmp_path) == FOLDERS["shards"][:2]
    assert texts(tmp_path, "test") == FOLDERS["shards"][2:]
    assert texts(tmp_path, "train[1:]") == FOLDERS["shards"][1:2]


@pytest.mark.parametrize("split", ["banana", "validation", "banana[:10]"])
def test_a_split_that_is_not_there_is_refused(tmp_path, split):
    write(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(DataError, match=r"has no split .*Set data\.split to one of test, train"):
        texts(tmp_path, split)


def test_a_file_is_train_or_what_its_name_says(tmp_path):
    write(tmp_path, "rows.jsonl", "test.jsonl")
    assert texts(tmp_path / "rows.jsonl") == ["rows.jsonl"]
    assert texts(tmp_path / "test.jsonl") == texts(tmp_path / "test.jsonl", "test") == ["test.jsonl"]
    for name, split in (("rows.jsonl", "test"), ("test.jsonl", "banana")):
        with pytest.raises(DataError, match="has no split"):
            texts(tmp_path / name, split)


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:10]", range(10)),
        ("train[10%:20%]", range(10, 20)),
        ("train[-5:]", range(95, 100)),
        ("train[:-90]", range(10)),
        ("train[98:200]", range(98, 100)),
        ("train[:]", range(100)),
        ("train[33%:34%]", range(33, 34)),
    ],
)
def test_a_part_of_a_split_is_the_rows_that_datasets_takes(tmp_path, split, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(LINE % number for number in range(100)))
    assert texts(path, split) == [str(number) for number in rows]
    theirs = datasets.load_dataset("json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache"))
    assert list(theirs["text"]) == [str(number) for number in rows]


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[1]", "[:10]", "train[:200%]", "train+test", ""])
def test_what_is_no_split_is_refused(tmp_path, split):
    write(tmp_path, "rows.jsonl")
    with pytest.raises(DataError, match="is no split"):
        texts(tmp_path / "rows.jsonl", split)


def test_an_empty_part_is_refused(tmp_path):
    write(tmp_path, "rows.jsonl")
    with pytest.raises(DataError, match=r"holds no rows in train\[5:\]: there are 1"):
        texts(tmp_path / "rows.jsonl", "train[5:]")


def test_what_lies_beside_data_is_no_data(tmp_path):
    beside = ["README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".cache/huggingface/a.metadata", "images/a.png", "load.py"]
    beside += ["dataset_infos.json", "_SUCCESS", "__pycache__/a.json"]
    write(tmp_path, "data/a.jsonl", *beside)
    assert texts(tmp_path) == ["data/a.jsonl"]


def test_what_no_split_has_is_said(tmp_path, caplog):
    write(tmp_path, "train.jsonl", "more.jsonl")
    assert texts(tmp_path) == ["train.jsonl"]
    assert "in no split, by their names: more.jsonl" in caplog.text


README = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: english/*.jsonl
  - split: held_out
    path: [english/more/*.jsonl]
- config_name: de
  data_dir: german
- config_name: flat
  data_files: english/a.jsonl
---
# Set
"""


def test_the_head_of_a_readme_says_subsets_and_splits(tmp_path):
    write(tmp_path, "english/a.jsonl", "english/more/b.jsonl", "german/train.jsonl", "german/test.jsonl")
    (tmp_path / "README.md").write_text(README)
    assert texts(tmp_path) == ["english/a.jsonl"]
    assert texts(tmp_path, "held_out") == ["english/more/b.jsonl"]
    assert texts(tmp_path, "test", subset="de") == ["german/test.jsonl"]
    assert texts(tmp_path, subset="flat") == ["english/a.jsonl"]
    with pytest.raises(DataError, match=r"has no subset 'fr'\. Set data\.subset to one of en, de, flat"):
        texts(tmp_path, subset="fr")
    for subset, split in (("en", "held_out"), ("de", "test"), ("flat", "train")):
        theirs = datasets.load_dataset(str(tmp_path), subset, split=split, cache_dir=str(tmp_path / ".cache"))
        assert list(theirs["text"]) == texts(tmp_path, split, subset=subset)


@pytest.mark.parametrize("name", ["rows.jsonl", "."])
def test_a_subset_of_files_that_have_none_is_refused(tmp_path, name):
    write(tmp_path, "rows.jsonl")
    with pytest.raises(DataError, match="has no subset 'en'"):
        texts(tmp_path / name, subset="en")


@pytest.fixture
def saved(tmp_path):
    rows = {name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(9)]}) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "both"), num_shards={"train": 2, "test": 1})
    rows["train"].select([3, 1]).save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_what_datasets_saved_to_disk_is_read(saved):
    assert texts(saved / "both", "test[:2]") == ["test 0", "test 1"]
    assert texts(saved / "both") == [f"train {number}" for number in range(9)]
    assert texts(saved / "one") == ["train 3", "train 1"]
    (saved / "one" / "cache-0123.arrow").write_bytes(b"left by a map")
    assert len(texts(saved / "one")) == 2


def test_what_was_saved_to_disk_must_be_whole(saved):
    (saved / "both" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: is missing"):
        texts(saved / "both")
    (saved / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: is not valid JSON"):
        texts(saved / "one")


def test_evaluation_has_its_own_split(tmp_path, prepare_run):
    from raytune_llm.data.pipeline import prepare

    for split, number in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps({"text": "some words"}) + "\n") * number)
    run = prepare_run(tmp_path, "data.eval_split=test", data="text")
    prepared = prepare(run.model, run.data, run.resources, kind="text")
    assert (len(prepared.store), len(prepared.eval_store)) == (3, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.eval_split=banana"], r"Set data\.eval_split to one of test, train"),
        (["data.eval_split='test[5:6]'"], r"Correct data\.eval_split"),
        (["data.eval_split='?'"], r"data\.eval_split=\?: is no split"),
        (["data.split=banana", "data.eval_split=test"], r"Set data\.split to one of test, train"),
    ],
)
def test_the_split_that_is_wrong_is_the_one_that_is_named(tmp_path, prepare_run, settings, said):
    from raytune_llm.data.pipeline import prepare

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    run = prepare_run(tmp_path, *settings, data="text")
    with pytest.raises(DataError, match=said):
        prepare(run.model, run.data, run.resources, kind="text")


@pytest.mark.parametrize(
    ("trained", "held_out", "shared"),
    [
        ("train", "train", True),
        ("train", "train[:100]", True),
        ("train[:60%]", "train[50%:]", True),
        ("train[1000:]", "train[-100:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:-100]", "train[-100:]", False),
        ("train", "test", False),
    ],
)
def test_rows_that_are_trained_on_are_not_held_out(tmp_path, prepare_run, trained, held_out, shared):
    run = prepare_run(tmp_path, f"data.split='{trained}'", f"data.eval_split='{held_out}'", data="text")
    if not shared:
        return check_held_out(run.data, ranked=False)
    with pytest.raises(ConfigError, match=r"data\.eval_split must be other rows than those that are trained on"):
        check_held_out(run.data, ranked=False)


def test_a_path_that_is_named_twice_is_said(tmp_path, prepare_run, caplog):
    check_held_out(prepare_run(tmp_path, f"data.eval_path={tmp_path}", data="text").data, ranked=False)
    assert "is trained on and evaluated on" in caplog.text


def test_prepare_refuses_held_out_rows_that_are_trained_on_before_it_reads_any(tmp_path):
    words = ["model=tiny_random", "data=text", f"data.path={tmp_path}", "data.split=train", "data.eval_split=train"]
    with pytest.raises(ConfigError, match=r"data\.eval_split must be other rows"):
        api.prepare(load_config("prepare", [*words, f"data.cache={tmp_path / 'stores'}"]))
    assert not list(tmp_path.iterdir())
