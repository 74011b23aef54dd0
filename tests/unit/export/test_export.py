from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.plain import to_yaml
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError, ResourceError, UserError
from raytune_llm.export.run import _beside, _take_place, check_space
from tests.limits import export_in_memory

TARGETS = ["q_proj", "o_proj", "down_proj"]
METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"),
    "rslora with patterns": LoraConfig(
        r=4, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 3},
        target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", exclude_modules=r".*layers\.0\.mlp.*",
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"),
    "oft": OFTConfig(oft_block_size=8, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM"),
    "embeddings and a whole head": LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip
IDS = torch.arange(40).remainder(256)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=258,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_of(base: Path, config: Any, name: str, auto: Any = AutoModelForCausalLM, **settings: Any) -> Path:
    torch.manual_seed(len(name))
    folder = base.parent / name.replace(" ", "_")
    adapted = get_peft_model(auto.from_pretrained(base, **settings), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


def exported(base: Path, place: Path, *settings: str):
    return api.export(load_config("export", [f"model.path={base}", f"export.output_dir={place}", *settings]))


@pytest.mark.parametrize("name", METHODS)
def test_a_merged_adapter_gives_the_logits_of_base_and_adapter(base, tmp_path, name):
    folder = adapter_of(base, METHODS[name], name)
    done = exported(base, tmp_path / "out", f"export.adapters={{a: '{folder}'}}", "export.check_rows=2")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
    assert (found - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-2
    assert done.difference is not None and done.difference.max_abs < 1e-5
    assert f"{done.difference.divergence:.2e}" in (tmp_path / "out" / "README.md").read_text()


def test_weighted_adapters_add_up(base, tmp_path):
    one, two = (adapter_of(base, METHODS["lora"], name) for name in ("first", "number two"))
    done = exported(base, tmp_path / "out", f"export.adapters={{a: '{one}', b: '{two}'}}", "export.weights={b: 0.5}")
    assert done.difference is None and "several adapters" in str(done.unchecked)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    for folder, factor in ((one, 1.0), (two, 0.5)):
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name.replace('.weight', f'.lora_{side}.weight')}"] for side in "AB")
        weight = weight + factor * 4 * (b @ a)
    assert torch.allclose(load_file(tmp_path / "out" / "model.safetensors")[name], weight, atol=1e-6)


def test_weights_that_leave_no_finite_numbers_are_refused(base, tmp_path):
    folder = adapter_of(base, METHODS["lora"], "lora")
    for dtype in ("fp32", "bf16"):
        with pytest.raises(ConfigError, match=r"export\.weights must result in finite numbers in model\.layers\.\d.*1e\+300"):
            exported(
                base, tmp_path / "out", f"export.adapters={{a: '{folder}'}}", "export.weights={a: 1e300}", f"export.dtype={dtype}"
            )
    assert not any(tmp_path.iterdir())


def test_an_adapter_that_is_called_as_the_run_is_refused_not_passed_over(base, tmp_path):
    run = tmp_path / "mine"
    words = ["model=hub", f"model.path={base}", "adapter=lora", f"name={run.name}", f"output_dir={run}", "data.path=rows.jsonl"]
    shutil.copytree(adapter_of(base, METHODS["lora"], "lora"), run / "final")
    (run / "run.yaml").write_text(to_yaml(load_config("train", ["data=chat", *words])))
    settings = [f"export.run={run}", f"export.output_dir={tmp_path / 'out'}", f"export.adapters={{mine: '{run / 'final'}'}}"]
    with pytest.raises(ConfigError, match=r"export\.adapters must not have the name mine, which is that of export\.run"):
        api.export(load_config("export", settings))


def test_adapters_that_lie_under_the_one_that_was_trained_are_merged_first(base, tmp_path):
    one, two = adapter_of(base, METHODS["lora"], "first"), adapter_of(base, METHODS["dora"], "number two")
    merged = [f"model.merged_adapters=['{one}']", "export.check_rows=2"]
    alone = exported(base, tmp_path / "alone", *merged)
    both = exported(base, tmp_path / "both", *merged, f"export.adapters={{b: '{two}'}}")
    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one)
    under = adapted.merge_and_unload().eval()
    with torch.no_grad():
        for done, expected in ((alone, under), (both, PeftModel.from_pretrained(copy.deepcopy(under), two).eval())):
            found = AutoModelForCausalLM.from_pretrained(done.place).eval()
            assert (found(IDS).logits - expected(IDS).logits).abs().max() < 1e-5
            assert done.difference is not None and done.difference.max_abs < 1e-5
            assert str(one) in (done.place / "README.md").read_text()


def test_a_reward_model_gives_the_scores_of_base_and_adapter(base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False, task_type="SEQ_CLS")
    folder = adapter_of(base, config, "reward", AutoModelForSequenceClassification, num_labels=1)
    done = exported(base, tmp_path / "out", f"export.adapters={{a: '{folder}'}}", "export.check_rows=2")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    before = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, PeftModel.from_pretrained(before, folder).eval()(IDS).logits, atol=1e-5)
    assert loaded.config.num_labels == 1
    below = [f"model.merged_adapters=['{folder}']"]
    exported(base, tmp_path / "below", *below)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "below").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, again(IDS).logits, atol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.merged_adapters must not be a reward model's adapter below one of a language"):
        exported(base, tmp_path / "no", *below, f"export.adapters={{a: '{adapter_of(base, METHODS['lora'], 'words')}'}}")
    assert done.difference is not None and done.difference.max_abs < 1e-5


def test_whole_modules_have_weights_and_add_up_with_what_another_adapter_changes(base, tmp_path):
    whole = adapter_of(base, METHODS["embeddings and a whole head"], "embeddings and a whole head")
    other = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = adapter_of(base, other, "on the head")
    name = "lm_head.weight"
    head = load_file(base / "model.safetensors")[name]
    change = load_file(whole / "adapter_model.safetensors")[f"base_model.model.{name}"] - head
    tensors = load_file(lora / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    assert change.abs().max() > 1e-3
    exported(base, tmp_path / "half", f"export.adapters={{a: '{whole}'}}", "export.weights={a: 0.5}")
    assert torch.allclose(load_file(tmp_path / "half" / "model.safetensors")[name], head + 0.5 * change, atol=1e-6)
    both = f"export.adapters={{a: '{whole}', b: '{lora}'}}"
    exported(base, tmp_path / "both", both, "export.weights={a: -1}")
    scaled = other.lora_alpha / other.r * (b @ a)
    assert torch.allclose(load_file(tmp_path / "both" / "model.safetensors")[name], head - change + scaled, atol=1e-6)


def test_a_score_head_has_no_other_weight_than_one(base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    folder = adapter_of(base, config, "a reward", AutoModelForSequenceClassification, num_labels=1)
    with pytest.raises(ConfigError, match=r"export\.weights must be 1 .* whole score\.weight"):
        exported(base, tmp_path / "out", f"export.adapters={{a: '{folder}'}}", "export.weights={a: 0.5}")


@pytest.mark.parametrize("format", ["hf", "adapter"])
def test_an_adapter_that_is_not_finite_is_refused(base, tmp_path, format):
    shutil.copytree(adapter_of(base, METHODS["lora"], "lora"), tmp_path / "lost")
    tensors = load_file(tmp_path / "lost" / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = torch.nan
    save_file(tensors, tmp_path / "lost" / "adapter_model.safetensors", {"format": "pt"})
    words = [f"export.adapters={{a: '{tmp_path / 'lost'}'}}", f"export.format={format}", "export.max_kl=1e9"]
    with pytest.raises(UserError, match="NaN"):
        exported(base, tmp_path / "out", *words)
    assert [place.name for place in tmp_path.iterdir()] == ["lost"]


def test_a_base_whose_outputs_are_no_numbers_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "lost")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lost: gives outputs that are not numbers \(NaN\)"):
        exported(tmp_path / "lost", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_the_model_is_merged_as_a_named_one(base, tmp_path):
    folder = adapter_of(base, METHODS["lora"], "lora")
    exported(base, tmp_path / "named", f"export.adapters={{a: '{folder}'}}", "export.check=false")
    exported(base, tmp_path / "alone", f"adapter.path={folder}", "export.check=false")
    names = [tmp_path / place / "model.safetensors" for place in ("named", "alone")]
    assert names[0].read_bytes() == names[1].read_bytes()
    exported(base, tmp_path / "half", f"adapter.path={folder}", "export.weights={lora: 0.5}", "export.check=false")
    assert (tmp_path / "half" / "model.safetensors").read_bytes() != names[0].read_bytes()
    with pytest.raises(ConfigError, match=r"adapter\.path can't be combined with export\.run"):
        exported(base, tmp_path / "out", "model.path=null", f"export.run={tmp_path}", f"adapter.path={folder}")
    with pytest.raises(ConfigError, match=r"^adapter\.path must be a folder with adapter_config\.json"):
        exported(base, tmp_path / "out", f"adapter.path={base}")


def test_only_an_export_is_replaced(base, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.yaml").touch()
    with pytest.raises(ConfigError, match=r"export\.output_dir must be empty, new, or an earlier export"):
        exported(base, run, "export.overwrite=true")
    assert (run / "checkpoints").is_dir()
    exported(base, tmp_path / "out", "export.check=false")
    with pytest.raises(ConfigError, match=r"must be empty or new, .*export\.overwrite=true"):
        exported(base, tmp_path / "out", "export.dtype=bf16")
    exported(base, tmp_path / "out", "export.check=false", "export.overwrite=true", "export.dtype=bf16")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_repeated_export_is_kept_unless_its_adapter_has_changed(base, tmp_path):
    folder = shutil.copytree(adapter_of(base, METHODS["lora"], "lora"), tmp_path / "adapter")
    words = [f"export.adapters={{a: '{folder}'}}", "export.check_rows=1"]
    first, again = (exported(base, tmp_path / "out", *words) for _ in range(2))
    assert again.found and not first.found
    assert (again.difference, again.num_bytes) == (first.difference, first.num_bytes)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * one for name, one in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"must be empty or new"):
        exported(base, tmp_path / "out", *words)
    assert not exported(base, tmp_path / "out", *words, "export.overwrite=true").found


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda file: file.unlink()),
        ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-8])),
        ("config.json", lambda file: file.unlink()),
        ("tokenizer.json", lambda file: file.unlink()),
    ],
)
def test_a_repeated_export_of_which_a_file_was_lost_or_cut_is_written_again(base, tmp_path, name, damage):
    place = exported(base, tmp_path / "out", "export.check=false").place
    damage(place / name)
    assert not exported(base, tmp_path / "out", "export.check=false").found
    AutoModelForCausalLM.from_pretrained(place)
    assert exported(base, tmp_path / "out", "export.check=false").found


def test_an_export_that_was_killed_between_its_renames_is_repeated_by_the_same_command(base, tmp_path):
    place = exported(base, tmp_path / "out", "export.check=false").place
    (place / "model.safetensors").unlink()
    work = tmp_path / ".out-export"
    shutil.copytree(place, work / "new")
    place.rename(work / "old")
    assert not exported(base, place, "export.check=false").found
    AutoModelForCausalLM.from_pretrained(place)
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


def test_a_repeated_export_that_is_kept_clears_what_a_killed_one_left(base, tmp_path):
    exported(base, tmp_path / "out", "export.check=false")
    (tmp_path / ".out-export" / "new").mkdir(parents=True)
    (tmp_path / ".out-export" / "new" / "model.safetensors").write_text("half")
    assert exported(base, tmp_path / "out", "export.check=false").found
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


def test_what_is_exported_is_not_replaced_by_its_export(base, tmp_path):
    first = exported(base, tmp_path / "first", "export.check=false").place
    inner = shutil.copytree(base, first / "inner")
    for model in (first, inner):
        with pytest.raises(ConfigError, match=r"export\.output_dir must not hold what is exported"):
            exported(model, first, "export.overwrite=true")
    assert (first / "model.safetensors").is_file()


def test_a_link_leads_to_the_place_and_files_and_mount_points_are_refused_before_anything_is_written(base, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    exported(base, tmp_path / "link", "export.check=false")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "model.safetensors").is_file()
    exported(base, tmp_path / "link", "export.check=false", "export.overwrite=true")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match=r"export\.output_dir must be a folder, "):
        exported(base, tmp_path / "file", "export.overwrite=true")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ConfigError, match=r"export\.output_dir must not be a mount point"):
        exported(base, Path("/dev/shm"))
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match=r"^export\.output_dir"):
        exported(base, tmp_path / "round")


def test_shards_hold_every_tensor_once_in_the_dtype_that_was_asked_for(base, tmp_path):
    exported(base, tmp_path / "out", "export.shard_size=20KB", "export.dtype=bf16", "export.max_kl=1")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    before = load_file(base / "model.safetensors")
    files = {file: load_file(tmp_path / "out" / file) for file in set(index.values())}
    assert len(files) > 2 and sum(map(len, files.values())) == len(before)
    for name, weight in before.items():
        assert torch.equal(files[index[name]][name], weight.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_would_change_the_answers_more_than_allowed_is_not_written(base, tmp_path):
    with pytest.raises(ConfigError, match=r"export\.max_kl is less than the divergence"):
        exported(base, tmp_path / "out", "export.dtype=bf16", "export.max_kl=0")
    assert not any(tmp_path.iterdir())


def test_a_crash_leaves_no_folder_that_looks_whole(base, tmp_path, monkeypatch):
    def crash(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.export(load_config("export", [f"model.path={base}", f"export.output_dir={tmp_path / 'out'}"]), on_progress=crash)
    assert not any(tmp_path.iterdir())


def test_it_needs_the_memory_of_a_layer_not_of_the_model(base, tmp_path):
    """Weights of 160 MiB, with 64 MiB of memory beside what the process had when it began (a thread takes 8 of them)."""
    big = tmp_path / "big"
    big.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (big / file).write_bytes((base / file).read_bytes())
    parts = {"a": load_file(base / "model.safetensors")}
    parts["b"] = {f"model.more.{number}.weight": torch.zeros(1024, 1024) for number in range(40)}
    for name, tensors in parts.items():
        save_file(tensors, big / f"{name}.safetensors")
    index = {
        "metadata": {},
        "weight_map": {tensor: f"{name}.safetensors" for name, tensors in parts.items() for tensor in tensors},
    }
    (big / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = adapter_of(base, METHODS["lora"], "lora")
    words = [
        f"model.path={big}",
        f"export.output_dir={tmp_path / 'out'}",
        f"export.adapters={{a: '{folder}'}}",
        "export.check=false",
    ]
    small = [*words, f"model.path={base}", f"export.output_dir={tmp_path / 'small'}"]
    export_in_memory(64 * 2**20, words, after=small)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 160 * 2**20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["export.adapters={a: /nothing/there}"], "export.adapters.a"),
        (["export.weights={a: 0.5}"], "export.weights"),
        (["export.shard_size=5"], "export.shard_size"),
        (["export.output_dir=null"], "export.output_dir must be given"),
        (["export.output_dir=/dev/null/x"], "export.output_dir"),
        (["model.path=null"], "model.path"),
        (["export.run=/nothing/there"], "can't be combined"),
        (["model.path=null", "export.run=/nothing/there"], "export.run"),
        (["export.check=true", "export.check_rows=0"], "export.check_rows"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(base, tmp_path, settings, said):
    with pytest.raises(UserError) as raised:
        exported(base, tmp_path / "out", *settings)
    assert said in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_an_adapter_of_another_base_and_a_place_that_is_taken_are_refused(base, tmp_path):
    values: dict[str, Any] = {**json.loads((base / "config.json").read_text()), "hidden_size": 48, "head_dim": 12}
    config = LlamaConfig(**values)
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for method in ("lora", "oft"):
        folder = adapter_of(base, METHODS[method], method)
        for format in ("hf", "adapter"):
            with pytest.raises(ConfigError, match=r"must be an adapter of this model: .*\d.*got"):
                exported(other, tmp_path / "out", f"export.adapters={{a: '{folder}'}}", f"export.format={format}")
            assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="must be empty"):
        exported(base, other)


DAMAGED = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_the_base_is_named_and_nothing_is_written(base, tmp_path, name):
    shutil.copytree(base, tmp_path / "base")
    damaged = tmp_path / "base" / name
    damaged.write_bytes(damaged.read_bytes()[:-100] if name.endswith("safetensors") else b"[" * 100_000)
    with pytest.raises(ConfigError, match=r"^model\.path"):
        exported(tmp_path / "base", tmp_path / "out", "export.check=false")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vocab_size": 10}, "whose config.json is of a model"),
        ({"vocab_size": -1}, "whose config.json is of a model"),
        ({"hidden_size": 64}, "must keep the shapes of the weights"),
    ],
)
def test_a_config_that_is_of_another_model_than_the_weights_is_refused_without_a_check_too(base, tmp_path, values, said):
    shutil.copytree(base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(ConfigError, match=said):
        exported(tmp_path / "base", tmp_path / "out", "export.check=false")
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer_of_an_adapter_is_named(base, tmp_path):
    folder = shutil.copytree(adapter_of(base, METHODS["lora"], "lora"), tmp_path / "adapter")
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"^export\.adapters\.a must be a folder whose tokenizer.*json can be read"):
        exported(base, tmp_path / "out", f"export.adapters={{a: '{folder}'}}")


def test_two_exports_to_one_place_do_not_mix(base, tmp_path):
    words = [f"model.path={base}", f"export.output_dir={tmp_path / 'out'}", "export.check=false"]
    refused: list[ConfigError] = []

    def begin_another(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(ConfigError, match=r"export\.output_dir is in use by process") as raised:
                api.export(load_config("export", words))
            refused.append(raised.value)

    api.export(load_config("export", words), on_progress=begin_another)
    assert refused and [place.name for place in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_killed_exports_leftovers_are_cleared_and_what_it_was_replacing_is_put_back(base, tmp_path):
    work = tmp_path / ".out-export"
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_text("half")
    (work / "old").mkdir()
    (work / "old" / "kept").write_text("from before")
    with pytest.raises(ConfigError, match=r"export\.max_kl"):
        exported(base, tmp_path / "out", "export.dtype=bf16", "export.max_kl=0", "export.check_rows=1")
    assert (tmp_path / "out" / "kept").read_text() == "from before"
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


def test_what_was_about_to_be_replaced_is_put_back_where_the_new_one_does_not_get_there(tmp_path):
    place = tmp_path / "out"
    place.mkdir()
    (place / "kept").touch()

    def replace_by_nothing() -> None:
        with _beside(place) as folder:
            folder.rmdir()
            _take_place(folder, place)

    with pytest.raises(FileNotFoundError):
        replace_by_nothing()
    assert [file.name for file in place.iterdir()] == ["kept"] and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_small_disk_is_said_in_units_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=3 * 2**20))
    with pytest.raises(ResourceError, match=r"needs 195\.3 KiB and 64\.0 MiB to spare, but .* has 3\.0 MiB left"):
        check_space(tmp_path, 200_000)
