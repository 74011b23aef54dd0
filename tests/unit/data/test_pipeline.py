from __future__ import annotations

import json
import shutil

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.data import pipeline, store
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.readers import sources
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError, DataError, ResourceError
from tests.limits import no_file_larger_than


def chat(number, answer="yes"):
    return {"messages": [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": answer}]}


def prepared(run, **settings):
    return prepare(run.model, run.data, run.resources, **settings)


def test_rows_come_out_in_order_with_their_answers_trained(jsonl, prepare_run):
    store = prepared(prepare_run(jsonl([chat(0), chat(1, "no")]))).store
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(store.row(number)[0]) for number in range(2)]
    assert texts[0] == "<|im_start|>user\nrequest 0<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    ids, (start, end), _ = store.row(1)
    assert tokenizer.decode(ids[start:end]) == "no<|im_end|>"


def test_a_second_run_takes_the_store_as_it_is(jsonl, prepare_run):
    run = prepare_run(jsonl([chat(0)]))
    first, second = prepared(run), prepared(run)
    assert (first.reused, second.reused) == (False, True)
    assert first.store.folder == second.store.folder


def test_the_store_is_found_again_under_another_file_name(jsonl, prepare_run):
    first = prepared(prepare_run(jsonl([chat(0)])))
    assert prepared(prepare_run(jsonl([chat(0)], name="moved.jsonl"))).store.folder == first.store.folder


@pytest.mark.parametrize("changed", ["data.max_length=99", "data.overlong=drop", "data.max_samples=1"])
def test_a_changed_setting_makes_another_store(jsonl, prepare_run, changed):
    path = jsonl([chat(0), chat(1)])
    assert prepared(prepare_run(path, changed)).store.folder != prepared(prepare_run(path)).store.folder


def test_changed_data_make_another_store(jsonl, prepare_run):
    first = prepared(prepare_run(jsonl([chat(0)])))
    assert prepared(prepare_run(jsonl([chat(1)]))).store.folder != first.store.folder


def test_max_samples_takes_the_first_rows(jsonl, prepare_run):
    run = prepare_run(jsonl([chat(number) for number in range(5)]), "data.max_samples=2")
    assert len(prepared(run).store) == 2


def test_an_eval_source_has_a_store_of_its_own(jsonl, prepare_run):
    held_out = jsonl([chat(7), chat(8), chat(9)], name="eval.jsonl")
    result = prepared(prepare_run(jsonl([chat(0)]), f"data.eval_path={held_out}"))
    assert (len(result.store), len(result.eval_store)) == (1, 3)


def test_several_eval_sources_have_one_store_together_with_their_names(jsonl, prepare_run):
    places = {name: jsonl([chat(number)] * number, name=f"{name}.jsonl") for number, name in enumerate(("a", "b"), 1)}
    run = prepare_run(jsonl([chat(0)]), f"data.eval_path={{a:{places['a']},b:{places['b']}}}")
    held_out = prepared(run).eval_store
    assert (len(held_out), held_out.sources) == (3, ("a", "b"))
    assert pipeline.find_stores(run.model, run.data)[1] == held_out.folder


def test_bad_rows_are_counted_by_reason_with_examples(jsonl, prepare_run):
    path = jsonl([chat(0), {"messages": []}, "{", chat(1)])
    dropped = prepared(prepare_run(path, "data.max_bad_fraction=0.5")).store.dropped
    assert sorted(dropped.counts.values()) == [1, 1]
    assert any(f"{path}, row 3" in examples[0] for examples in dropped.examples.values())


def test_too_many_bad_rows_stop_the_run(jsonl, prepare_run):
    path = jsonl([chat(0), {"messages": []}])
    with pytest.raises(DataError, match=r"1 of 2 rows can't be used, more than data\.max_bad_fraction = 0\.01"):
        prepared(prepare_run(path))


def test_too_many_bad_rows_stop_a_run_that_finds_the_store_made(jsonl, prepare_run):
    path = jsonl([chat(0), {"messages": []}])
    prepared(prepare_run(path, "data.max_bad_fraction=0.5"))
    with pytest.raises(DataError, match="can't be used"):
        prepared(prepare_run(path, "data.max_bad_fraction=0.1"))


def test_rows_without_the_column_name_the_setting_and_the_columns(jsonl, prepare_run):
    path = jsonl([{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"no column 'messages' \(data\.format\.messages\).*there are instruction, output"):
        prepared(prepare_run(path, "data.max_bad_fraction=1.0"))


def test_everything_truncated_away_is_refused(jsonl, prepare_run):
    path = jsonl([chat(number) for number in range(3)])
    with pytest.raises(DataError, match=r"no row can be used.*3 x no trained token is left after truncation"):
        prepared(prepare_run(path, "data.max_length=1"))


def test_an_overlong_row_is_refused_by_name_where_asked(jsonl, prepare_run):
    path = jsonl([chat(0), chat(1, "long " * 50)])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: the row has \d+ tokens, data\.max_length is 100"):
        prepared(prepare_run(path, "data.max_length=100", "data.overlong=error"))


def test_a_template_that_rewrites_turns_is_refused_by_name(jsonl, prepare_run, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages[-1:] %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"row 1: the chat template of .*tokenizer does not keep"):
        prepared(prepare_run(jsonl([chat(0)]), f"model.tokenizer={tmp_path / 'tokenizer'}"))


def test_a_refused_run_leaves_no_store(jsonl, prepare_run, tmp_path):
    with pytest.raises(DataError):
        prepared(prepare_run(jsonl([{"messages": []}])))
    assert list((tmp_path / "cache").glob("*/manifest.json")) == []


def test_finished_shards_of_a_crashed_run_are_kept(tmp_path, jsonl, prepare_run, monkeypatch):
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 300)
    path = jsonl([chat(number) for number in range(20)])
    run = prepare_run(path)
    whole = prepared(run).store.manifest
    shutil.rmtree(tmp_path / "cache")
    made = []

    def crash_at_the_third(chunk, recipe, path):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return make(chunk, recipe, path)

    make = pipeline.prepare_chunk
    monkeypatch.setattr(pipeline, "prepare_chunk", crash_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepared(run)
    monkeypatch.setattr(pipeline, "prepare_chunk", lambda *args: made.append(args[2].name) or make(*args))
    assert prepared(run).store.manifest == whole
    assert sorted(made) == [shard["name"] for shard in whole["shards"]]


def test_progress_counts_rows(jsonl, prepare_run, monkeypatch):
    monkeypatch.setattr(sources, "MIN_CHUNK_BYTES", 300)
    seen = []
    prepared(prepare_run(jsonl([chat(number) for number in range(20)])), on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_alpaca_file_is_prepared(tmp_path, prepare_run):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "add", "input": "1 2", "output": "3"}]))
    assert len(prepared(prepare_run(path, data="alpaca")).store) == 1


def test_a_model_folder_without_a_tokenizer_is_refused(jsonl, tmp_path):
    (tmp_path / "model").mkdir()
    settings = [f"model.path={tmp_path / 'model'}", f"data.path={jsonl([chat(0)])}", f"data.cache={tmp_path}", "resources=inline"]
    run = load_config("prepare", settings)
    with pytest.raises(ConfigError, match=r"model\.path holds no tokenizer"):
        prepared(run)


def test_a_named_template_takes_the_place_of_the_tokenizers_own(jsonl, prepare_run):
    store = prepared(prepare_run(jsonl([chat(0)]), "data.template=vicuna", "data.default_system=Be brief.")).store
    ids, (start, end), _ = store.row(0)
    text = byte_tokenizer().decode(ids)
    assert text.startswith("Be brief.") and "USER: request 0 ASSISTANT:" in text
    assert byte_tokenizer().decode(ids[start:end]) == "yes<|im_end|>"


def test_a_default_system_text_goes_before_a_conversation_without_one(jsonl, prepare_run):
    store = prepared(prepare_run(jsonl([chat(0)]), "data.default_system=Be brief.")).store
    assert byte_tokenizer().decode(store.row(0)[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_a_tokenizer_without_a_template_takes_the_one_of_its_models_name(jsonl, prepare_run, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    for name in ("Qwen2.5-0.5B", "mine"):
        tokenizer.save_pretrained(tmp_path / name)
    rows = jsonl([chat(0)])
    store = prepared(prepare_run(rows, f"model.path={tmp_path / 'Qwen2.5-0.5B'}", "model.tokenizer=null")).store
    assert "<|im_start|>user" in tokenizer.decode(store.row(0)[0])
    with pytest.raises(ConfigError, match=r"data\.template must name a template"):
        prepared(prepare_run(rows, f"model.path={tmp_path / 'mine'}", "model.tokenizer=null"))


@pytest.mark.parametrize("kind", ["pairs", "labeled", "prompts", "text"])
def test_rows_of_every_kind_are_stored(jsonl, prepare_run, kind):
    row = {**chat(0), "chosen": "yes", "rejected": "no", "label": True, "text": "some text"}
    if kind == "pairs":
        row["messages"] = row["messages"][:1]
    data = {"pairs": "chat_pairs", "labeled": "chat_labeled", "prompts": "chat", "text": "text"}[kind]
    store = prepared(prepare_run(jsonl([row]), data=data), kind=kind).store
    assert (store.kind, len(store)) == (KINDS[kind], 1)


def test_entries_of_a_dataset_info_have_a_store_each_and_one_together(jsonl, prepare_run, tmp_path):
    for name, number in (("a", 1), ("b", 2)):
        jsonl([{"instruction": f"request {number}", "output": "yes"}] * number, name=f"{name}.jsonl")
    (tmp_path / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.jsonl"} for name in "ab"}))
    settings = ["data.path=null", f"data.dataset_info={tmp_path}"]
    both = prepared(prepare_run("unused", *settings, "data.names=[a,b]"))
    assert (
        prepared(prepare_run("unused", *settings, "data.names=[b]", "data.eval_names=[a,b]")).eval_store.folder
        == both.store.folder
    )
    assert (len(both.store), both.store.sources) == (3, ("a", "b"))
    assert prepared(prepare_run("unused", *settings, "data.names=[b]")).reused
    assert (
        pipeline.find_stores(
            *(getattr(prepare_run("unused", *settings, "data.names=[a,b]"), part) for part in ("model", "data"))
        )[0]
        == both.store.folder
    )


def test_part_of_a_split_and_a_draw_of_rows(jsonl, prepare_run):
    path = jsonl([chat(number) for number in range(10)])
    assert len(prepared(prepare_run(path, "data.split='train[:40%]'")).store) == 4
    assert len(prepared(prepare_run(path, "data.num_samples=13")).store) == 13


@pytest.mark.parametrize(
    "settings",
    [
        ["data.mask_history=true", "data.train_on_prompt=true"],
        ["data.names=[a]"],
        ["data.tool_format=qwen"],
        ["data.mix=interleave_over"],
        ["data.mix_weights=[1.0]"],
        ["data.mix_epochs=[2.0]"],
        ["data.eval_names=[a]"],
        ["data.eval_fraction={a:0.1}"],
        ["data.eval_fraction=0.1", "data.eval_path=b.jsonl"],
    ],
)
def test_settings_that_would_be_ignored_are_refused(prepare_run, settings):
    with pytest.raises(ConfigError):
        prepare_run("rows.jsonl", *settings)


def test_a_shard_that_was_damaged_in_the_cache_is_not_trained_on(jsonl, prepare_run):
    run = prepare_run(jsonl([chat(number) for number in range(20)]))
    shard = prepared(run).folder / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: does not match its hash.*Delete the folder .*prepare again"):
        prepared(run)


def test_shards_are_compared_with_their_hashes_once(jsonl, prepare_run, monkeypatch):
    run = prepare_run(jsonl([chat(number) for number in range(20)]))
    folder = prepared(run).folder
    monkeypatch.setattr(store, "sha256_of", lambda file: pytest.fail("read again"))
    assert prepared(run).reused
    record = folder.with_name(f".{folder.name}.checked")
    record.write_text("[")
    monkeypatch.undo()
    assert prepared(run).reused, "a damaged record is none"


@pytest.mark.parametrize("size", [0, 300])
def test_a_full_disk_is_named_whatever_is_written(size, jsonl, prepare_run):
    """The outline of the store, its shards, its manifest."""
    run = prepare_run(jsonl([chat(number) for number in range(3)]))
    with no_file_larger_than(size), pytest.raises(ResourceError, match=r"token store can't be written to .*set data\.cache"):
        prepared(run)
    assert not prepared(run).reused
