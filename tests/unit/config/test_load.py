from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm import ConfigError, api, load_config, load_sweep
from raytune_llm.config import options, override_syntax
from raytune_llm.config.load import ANY_KEY
from raytune_llm.config.overrides import CONF
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.plain import flat_items, read_yaml, to_yaml

DATA = "data.path=rows.jsonl"
STREAM = ["data.streaming=true", "train.max_steps=9", "checkpoint.every_steps=3"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr is no setting. Did you mean optimizer.lr?"),
        (["optimzer.lr=1"], "Did you mean optimizer.lr?"),
        (["lr=1"], "lr is no setting. Did you mean optimizer.lr?"),
        (["+optimizer.lrr=1", DATA], "Did you mean optimizer.lr?"),
        (["model=smollm2"], "Did you mean model=smollm2_135m or smollm2_135m_base or smollm2_1_7b or smollm2_360m?"),
        (["+experiment=sft_smolm2"], "Did you mean experiment=sft_smollm2?"),
        (["strategy=fsd"], "Did you mean strategy=fsdp?"),
        ([DATA, "train.log_every_steps=0"], "train.log_every_steps must be at least 1, got 0"),
        ([DATA, "train.log_every_steps=abc"], "train.log_every_steps must be a whole number, got 'abc'"),
        ([DATA, "train.log_every_steps=true"], "train.log_every_steps must be a whole number, got True"),
        ([DATA, "train.precision=fp64"], "train.precision must be 'auto', 'bf16', 'fp16' or 'fp32', got 'fp64'"),
        ([DATA, "adapter.dropout=1.5"], "adapter.dropout must be below 1, got 1.5"),
        ([], "data.path must name a file"),
        ([DATA, "train.micro_batch_size=3"], "train.global_batch_size must be a multiple of"),
        ([DATA, "resources=local", "resources.num_workers=3"], "= 1 x 3, got 8. Set it to 9"),
        ([DATA, "resources=inline", "resources.num_workers=2"], "resources.num_workers must be 1, got 2"),
        ([DATA, "resources=inline", "strategy=fsdp"], "strategy must be ddp if resources=inline"),
        (
            [DATA, "quantization=bnb_nf4", "strategy=zero3"],
            "can't be zero3 if quantization=bnb_nf4: ZeRO-3 partitions weights of one type",
        ),
        (
            [DATA, "quantization=bnb_nf4", "adapter=none"],
            "can't be bnb_nf4 with adapter=none: quantized weights",
        ),
        ([DATA, "train.early_stopping=2"], "train.early_stopping needs held-out rows, got 2. Set data.eval_fraction"),
        ([DATA, "checkpoint.final=best"], "checkpoint.final needs held-out rows"),
        (
            [DATA, "data.eval_fraction=0.1", "train.early_stopping=2", "train.early_stopping_metric=eval_los"],
            "train.early_stopping_metric must be a metric that evaluations report, got 'eval_los'. Did you mean eval_loss?",
        ),
        (
            [DATA, "data.eval_fraction=0.1", "train.early_stopping_metric=eval_rewards/margins"],
            "train.early_stopping_metric must be a metric that evaluations report, got 'eval_rewards/margins'. There are: eval",
        ),
        ([DATA, "data.eval_fraction=0.1", "data.eval_path=x"], "data.eval_fraction can't be combined with data.eval_path"),
        ([DATA, "data.streaming=true"], "train.max_steps must be given if data.streaming=true"),
        ([DATA, *STREAM, "train.epochs=2"], "train.epochs can't be combined with data.streaming=true"),
        (
            [DATA, *STREAM, "data.eval_fraction=0.1"],
            "data.eval_fraction can't be combined with data.streaming=true, got 0.1. Set data.eval_path",
        ),
        ([DATA, "data.eval_fraction=0.1", "data.eval_rows=5"], "data.eval_rows can't be combined with data.eval_fraction"),
        ([DATA, "train.epochs=0"], "train.epochs must be above 0, got 0"),
        ([DATA, "data.eval_fraction=1.0"], "data.eval_fraction must be at least 0 and below 1"),
        ([DATA, "model=hub"], "model.path must name a folder or a hub id"),
        ([DATA, "model=tiny_random", "model.tokenizer=null"], "model.tokenizer must be given"),
        (["data.path=[a"], "data.path has a quote or a bracket that is not closed, got '[a'"),
        ([DATA, "data.cache='x"], "data.cache has a quote or a bracket that is not closed"),
        ([DATA, "données=1"], "an override must read key=value, got 'données=1'"),
        (["data.path=a,b.jsonl"], "data.path has several values, got 'a,b.jsonl'. Add -m"),
        (["data.path=2024"], "data.path must be text, got 2024. Quote it twice"),
        ([DATA, "schedule.warmup_steps=10"], "schedule.warmup_steps must be given if schedule.warmup_ratio is null, and only"),
        ([DATA, "schedule.warmup_ratio=null"], "schedule.warmup_steps must be given if schedule.warmup_ratio is null"),
        ([DATA, "train=1"], "train"),
    ],
)
def test_a_mistake_names_the_setting_the_rule_and_the_remedy(overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config("train", overrides)
    assert said in str(error.value)


def test_every_key_can_be_overridden_without_a_plus_sign():
    run = load_config("train", [DATA, "model.config.rope_theta=1e5", "optimizer.lr=3e-4", "resources.num_workers=2"])
    assert run.model.config == {"rope_theta": 1e5}
    assert run.optimizer.lr == 3e-4
    assert run.resources.num_workers == 2


def test_settings_whose_keys_are_the_user_s_choice_take_them_without_a_plus_sign():
    for file in CONF.rglob("*.yaml"):
        section = ".".join(file.relative_to(CONF).parent.parts)
        for name, value in flat_items(read_yaml(file, setting="conf")):
            if value == {}:
                assert f"{section}.{name}".lstrip(".") in ANY_KEY
    for word in ("submit.env={TRIAL: one}", "submit.env.TRIAL=one"):
        run = load_config("submit", ["+experiment=sft_full_tiny", "submit.address=http://head:8265", word])
        assert run.submit.env == {"TRIAL": "one"}
    with pytest.raises(ConfigError, match=r"submit\.env must have names of letters, digits and underscores, got 'A=B'"):
        load_config("submit", ["+experiment=sft_full_tiny", "submit.env={'A=B': one}"])


def test_served_adapters_are_named_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    run = load_config("serve", ["serve.adapters={mine: mine, b.2: /b/final}", "serve.adapters.c=~"])
    assert run.serve.adapters == {"mine": "mine", "b.2": "/b/final", "c": "~"}
    assert with_absolute_paths(run).serve.adapters == {"mine": f"{tmp_path}/mine", "b.2": "/b/final", "c": str(Path.home())}
    assert load_config("chat", ["chat.adapters={mine: mine}"]).chat.adapters == {"mine": "mine"}


def test_a_run_is_frozen():
    run = load_config("train", [DATA])
    with pytest.raises(AttributeError):
        run.optimizer.lr = 1.0


NEEDS = {
    "loftq": ["quantization=bnb_nf4"],
    "schedule_free": ["schedule=constant"],
    "lomo": ["train.max_grad_norm=null"],
    "adalomo": ["train.max_grad_norm=null"],
}
"""What options can't be without."""


@pytest.mark.parametrize("group", [group for group in options.groups() if group != "experiment"])
def test_every_option_of_every_group_composes(group):
    for option in (
        options.options(group) if group != "model" else ["hub", "smollm2_135m", "tiny_random"]
    ):  # the rest: test_pages.py
        given_path = ["model.path=some/model"] if option == "hub" else []
        resources = ["resources=local"] if group != "resources" else []
        verb = {"engine": "serve", "tune": "tune"}.get(group)
        if verb is not None:
            load_config(
                verb, [f"{group}={option}", *([] if verb == "serve" else [DATA, "data.eval_fraction=0.1", "train.epochs=2"])]
            )
            continue
        load_config("train", [DATA, *resources, f"{group}={option}", *given_path, *NEEDS.get(option, ())])


RUNS = [name for name in options.options("experiment") if name not in options.of_verbs()]
"""Experiments that `train` runs; the others are for `tune` and `chain`."""


@pytest.mark.parametrize("experiment", RUNS)
def test_every_experiment_is_complete_as_it_is(experiment):
    run = load_config("train", [f"+experiment={experiment}"])
    assert Path(run.data.path).is_file()
    assert run.data.evaluates and (run.train.eval_on_start or run.train.exact_match_rows)


@pytest.mark.parametrize("experiment", options.sweeps())
def test_every_sweep_is_complete_as_it_is(experiment):
    sweep = load_sweep([f"+experiment={experiment}"])
    assert Path(sweep.base.data.path or "").is_file()
    assert sweep.base.data.evaluates and len(sweep.planned) == sweep.tune.trials
    assert load_sweep([f"+experiment={experiment}", DATA]).base.data.path == "rows.jsonl"


@pytest.mark.parametrize("experiment", [name for name, verb in options.of_verbs().items() if verb == "chain"])
def test_every_chain_is_complete_as_it_is(experiment):
    run = load_config("chain", [f"+experiment={experiment}", "also={sft: [train.max_steps=2]}"])
    for name in run.steps:
        verb, *words = run.words(name)
        load_config(verb, words)
    assert run.words("sft")[-1] == "train.max_steps=2"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "steps must have commands"),
        (["steps={a: [serve]}"], r"steps\.a must begin with a verb of prepare, train"),
        (["steps={a: []}"], r"steps\.a must begin"),
        (["steps={a: [train]}", "also={b: [x=1]}"], r"also must have names of steps \(a\)"),
        (["+experiment=sft_smollm2"], r"is no chain of commands, got 'sft_smollm2'"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_config("chain", settings)


def test_a_mistake_in_a_later_step_of_a_chain_is_said_before_the_first_one_runs(tmp_path):
    steps = f"steps={{a: [train, model=tiny_random, {DATA}, 'output_dir={tmp_path / 'a'}'], b: [export, export.output_dir=null]}}"
    with pytest.raises(ConfigError, match=r"export\.output_dir must be given"):
        api.chain(load_config("chain", [steps]))
    assert not any(tmp_path.iterdir())


def test_an_export_at_the_end_of_a_chain_is_looked_at_before_the_training_before_it(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    train = f"[train, model=tiny_random, {DATA}, 'output_dir={tmp_path / 'a'}']"

    def refused(*settings: str) -> str:
        words = ", ".join(f"'{setting}'" for setting in (f"export.run={tmp_path / 'a'}", *settings))
        with pytest.raises(ConfigError) as caught:
            api.chain(load_config("chain", [f"steps={{a: {train}, b: [export, {words}]}}"]))
        return str(caught.value)

    assert refused(f"export.output_dir={tmp_path / 'full'}").startswith("export.output_dir must be empty")
    place = f"export.output_dir={tmp_path / 'new'}"
    quantize = refused(place, "export.format=gguf", "export.dtype=q4_k_m", "export.llama_quantize=nothing")
    assert quantize.startswith("export.llama_quantize must be a program")
    assert refused(place, "export.format=gptq", "export.python=/nothing").startswith("export.python must be a Python")
    assert refused(place).startswith("export.run must be a run whose base has a path")
    monkeypatch.setattr("raytune_llm.export.quantized.codec.find_spec", lambda name: None)
    assert refused(place, "export.format=nf4").startswith("export.format can't be nf4 here: bitsandbytes is not installed")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("verb", ["train", "plan", "submit"])
def test_a_chain_goes_with_its_verb_alone(verb):
    with pytest.raises(ConfigError, match=r"is a chain of commands, .*Write python -m raytune_llm chain \+experiment=sft_then"):
        load_config(verb, ["+experiment=sft_then_dpo_then_export_smollm2"])


@pytest.mark.parametrize("verb", ["train", "plan", "submit"])
def test_a_sweep_goes_with_tune_alone(verb):
    with pytest.raises(ConfigError, match=r"experiment is a sweep, .*Write python -m raytune_llm tune \+experiment=tune_smollm2"):
        load_config(verb, ["+experiment=tune_smollm2"])


@pytest.mark.parametrize("experiment", RUNS)
def test_a_users_own_data_take_the_place_of_an_experiments(experiment):
    assert load_config("train", [f"+experiment={experiment}", DATA]).data.path == "rows.jsonl"
    run = load_config("train", [f"+experiment={experiment}", "data.dataset_info=info.json", "data.names=[mine]"])
    assert run.data.path is None


def test_another_data_set_by_name_takes_the_place_of_an_experiments():
    run = load_config("train", ["+experiment=dpo_qwen", "data=ultrafeedback_binarized"])
    assert (run.data.path, run.data.split) == ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")


def test_a_part_of_a_trials_own_rows_is_held_out_and_of_a_users_only_what_is_asked_for():
    assert load_config("train", ["+experiment=sft_full_tiny"]).data.eval_fraction == 0.1
    assert load_config("train", ["+experiment=sft_full_tiny", DATA]).data.eval_fraction == 0
    assert load_config("train", ["+experiment=sft_full_tiny", DATA, "data.eval_path=held_out.json"]).data.evaluates


@settings(max_examples=10)
@given(st.floats(1e-6, 1), st.integers(1, 64), st.sampled_from(["ddp", "fsdp", "zero3"]), st.booleans())
def test_a_written_run_reads_back_as_itself(tmp_path_factory, lr, rank, strategy, packing):
    overrides = [DATA, f"optimizer.lr={lr}", f"adapter.rank={rank}", f"strategy={strategy}", f"data.packing={packing}"]
    run = load_config("train", overrides)
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(to_yaml(run))
    assert load_config("train", config_dir=folder, config_name="run") == run


def test_a_run_goes_on_in_its_output_folder_wherever_that_lies_now(tmp_path):
    moved = tmp_path / "it's moved"
    (moved / "checkpoints").mkdir(parents=True)
    (moved / "run.yaml").write_text(to_yaml(load_config("train", [DATA, "output_dir=/once/here"])))
    assert load_config("train", config_dir=moved, config_name="run").output_dir == str(moved)
    assert load_config("train", ["output_dir=else"], config_dir=moved, config_name="run").output_dir == "else"


def test_a_users_folder_adds_options_and_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /adapter: none\nname: mine\n"
    )
    run = load_config("train", [DATA, "+experiment=mine"], config_dir=tmp_path)
    assert (run.name, run.adapter.name) == ("mine", "none")


def test_an_unset_environment_variable_is_a_mistake_in_the_setting_that_asks_for_it():
    with pytest.raises(ConfigError, match=r"data\.cache can't be resolved"):
        load_config("train", [DATA, "data.cache=${oc.env:NO_SUCH_VARIABLE}"])


@pytest.mark.parametrize(
    "value",
    [
        "~/rows.jsonl", "données.jsonl", "rows (1).jsonl", "rows(1).jsonl", "a=b.jsonl", "it's.jsonl", "日本 語.jsonl",
        "a;b&c#d!.jsonl",
        "{lang}/rows.jsonl", "[final].jsonl", "C:\\rows~1\\a.jsonl", 'say "yes".jsonl', "a\\'b.jsonl", "dé, it.jsonl",
    ],
)  # fmt: skip
def test_a_path_is_taken_as_it_is_typed(value):
    assert load_config("prepare", [f"data.path={value}"]).data.path == value


@pytest.mark.parametrize("split", ["train[:10]", "train[10%:20%]", "validation[-100:]"])
def test_a_part_of_a_split_is_taken_as_it_is_typed(split):
    assert load_config("prepare", [DATA, f"data.split={split}"]).data.split == split


def test_lists_and_objects_hold_texts_as_they_are_typed():
    run = load_config("prepare", ["data.path=null", "data.dataset_info=~/info", "data.names=[dé (1), b, ~/c]"])
    assert run.data.names == ["dé (1)", "b", "~/c"]
    assert load_config("prepare", [DATA, "data.eval_path={a: dé.jsonl}"]).data.eval_path == {"a": "dé.jsonl"}


@pytest.mark.parametrize("pattern", [r"layers\.1\.", "(q|k)_proj", "layers.[0-3]", r"x\(y\)", r"a\\b", "k{2}$", "a:b", r"x\\(y)"])
def test_regular_expressions_may_be_names_in_an_object(pattern: str):
    run = load_config("train", [DATA, f"adapter.rank_pattern={{'{pattern}': 4}}"])
    assert run.adapter.rank_pattern == {pattern: 4}


def test_a_name_in_an_object_that_the_command_line_has_no_letter_for_is_told():
    with pytest.raises(ConfigError, match=r"optimizer\.groups has a name, \^model, with a character .*\\A in place of \^"):
        load_config("train", [DATA, "optimizer.groups={'^model': {lr_factor: 0.1}}"])


@pytest.mark.parametrize(
    "text", ["/a,b/final", "/plain/final", "null", "/it's, here", "/001_lr=0.001", "[x]", "1e5", "true", "choice(1,2)"]
)
def test_a_command_that_is_shown_gives_its_setting_the_same_text(text):
    assert override_syntax.one_value(override_syntax.as_word("adapter.path", text)) == ("adapter.path", text)
    assert override_syntax.as_word("adapter.path", "/plain/final") == "adapter.path=/plain/final"


def test_with_several_values_each_is_taken_as_it_is_typed():
    typed = override_syntax.as_typed("data.split=train[:10],train[10:]", several=True)
    assert typed == "data.split='train[:10]','train[10:]'"


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12))
def test_any_text_in_quotes_is_that_text(text):
    override = OverridesParser.create().parse_override(f"key={override_syntax.quoted(text)}")
    assert override.value() == text


def test_adapters_are_named_as_the_user_likes():
    typed = ["serve.adapters={a: /outputs/a/final, b-2: /outputs/b}"]
    assert load_config("serve", typed).serve.adapters == {"a": "/outputs/a/final", "b-2": "/outputs/b"}
