"""Mistakes on the command line and in users' files: exit code 2, the setting named, no traceback, and nothing written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raytune_llm.__main__ import main
from raytune_llm.config import command_line, load, mistakes
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.errors import UserError

ROWS = "data.path=rows.jsonl"


def answer(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """What a refused command says."""
    assert main(list(line)) == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Commands run in an empty folder, which stays empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("value", ["null", "1", "false", "[]", "{a: 1}"])
@pytest.mark.parametrize("group", ["model", "data", "stage", "optimizer", "resources", "adapter"])
def test_a_group_is_given_the_name_of_an_option(capsys, group: str, value: str):
    said = answer(capsys, f"{group}={value}", *([ROWS] if group != "data" else []))
    assert group in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["=1"], "must read key=value"),
        (["experiment=sft_qwen"], r"Write +experiment=sft_qwen."),
        (["adapter=none", "adapter.rank=8"], "It is one of adapter="),
        (["stage=dpo", "stage.z_loss=1"], "stage=sft"),
        (["schedule=constant", "schedule.floor=0.1"], "schedule=cosine"),
        (["resources=inline", "resources.cpus_per_worker=2"], "resources=local"),
        (["+foo.bar=1"], "foo is no setting. `python -m raytune_llm train --cfg job` shows every setting."),
        (["adapter.targets=q_proj", "resources=inline"], "Names are a list, adapter.targets=[q_proj]."),
        (["data.share_prompts=yes"], "true or false"),
        (["train.compile=maybe"], "true or false or auto"),
        (["train.cuda_graphs=true", "strategy=fsdp", "resources=local"], "can't be true with strategy=fsdp"),
        (["train.cuda_graphs=true", "data.packing=false"], "can't be true with data.packing=false"),
        (["train.cuda_graphs=true", "train.activation_checkpointing=offload"], "which waits for the host"),
        (["train.cuda_graphs=true", "train.activation_checkpointing=full", "train.compile=false"], "which waits for the host"),
        (["train.cuda_graphs=true", "resources=local", "resources.num_workers=2"], "resources.num_workers=2"),
        (["data.names=a"], "must be a list"),
        (["strategy=zero1", "resources=inline"], "got 'zero1'"),
        (["name=../x"], "name must be a name without slashes"),
        (["optimizer.lr=inf"], "a finite number"),
        (["adapter.alpha=inf"], "a finite number"),
        (["train.seed=12345678901234567890123456"], "train.seed must be below"),
        (["~data.path"], "data.path can't be removed"),
        (["adapter=[0,0]"], "adapter must be the name of one of its options"),
        (["+stage=a\0b"], "stage must be the name of one of its options"),
        (["~stage", "data.path=x"], "stage must be given. Set stage to one of cpo, dpo,"),
        (["~train.seed", "data.path=x"], "train.seed must be given. Set train.seed, and leave ~train.seed out."),
        (["hydra=1"], "hydra is no group of options"),
        (["~train.epochs=7"], "Write ~train.epochs."),
        (["train.epochs@a=7"], "Write train.epochs=... without the @."),
        (["name=caf\udce9"], "name must be text in UTF-8"),
        (["name='a"], "Close the quote."),
        (["name=" + "../" * 3000], "(9,002 characters)"),
        (["--resolve"], "--cfg job --resolve"),
        (["--multirun", "--cfg", "job"], "one of these flags"),
        (["--foo"], "no such flag"),
        (["--cfg", "nothing"], "--cfg must be followed by job"),
        (["--config-nam", "x"], "--config-name"),
    ],
)
def test_the_answer_names_the_setting_and_the_way_out(capsys, tmp_path: Path, monkeypatch, line: list[str], said: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    assert said in answer(capsys, *line, ROWS)


def test_a_setting_of_another_verb_is_called_that(capsys):
    said = answer(capsys, "prepare", "model=smollm2_135m", "data=commands", "output_dir=/tmp/x")
    assert "output_dir is no setting of prepare, but of train" in said and "Leave it out" in said


def test_a_second_file_is_not_ignored(capsys):
    assert "one file after import" in answer(capsys, "import", "a.yaml", "b.yaml")


FILES = {
    "unclosed": ("# @package _global_\ntrain: {epochs: 1\n", "line 3"),
    "tabs": ("# @package _global_\ntrain:\n\tepochs: 1\n", "line 3"),
    "twice": ("# @package _global_\ntrain:\n  epochs: 1\n  epochs: 2\n", "duplicate key epochs"),
    "latin": (b"# @package _global_\nname: caf\xe9\n", "UTF-8"),
    "itself": ("# @package _global_\ndefaults:\n  - itself\n", "includes itself"),
    "no_package": ("train:\n  epochs: 2\n", "# @package _global_"),
    "a_list": ("- a\n- b\n", "# @package _global_"),
    "empty": ("", "# @package _global_"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_user_s_file_is_named_with_what_is_wrong(capsys, tmp_path: Path, name: str):
    content, said = FILES[name]
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / f"mine/experiment/{name}.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in answer(capsys, "--config-dir", str(tmp_path / "mine"), f"+experiment={name}", ROWS)


@pytest.mark.parametrize("seed", range(40))
def test_random_overrides_are_taken_or_refused_without_a_traceback(seed: int):
    draw = random.Random(seed)
    keys = [*(line.partition(":")[0] for line in load.defaults("train")), *load.groups(), "foo", "", "model.config.rope_theta"]
    values = ["null", "1", "-1", "1e400", "nan", "true", "[]", "{}", "[a,b]", "{a: b}", "'", "é", "a b", "${x}", "~/x", "../x",
              "1,2", "\\", "9" * 30, "=", "x" * 5000, "null,null", "{a", "]", "%", "\n"]  # fmt: skip
    line = []
    for _ in range(3):
        prefix = draw.choice(["", "", "", "+", "++", "~"])
        line.append(f"{prefix}{draw.choice(keys)}={draw.choice(values)}")
    # data.path stays a file that is not there: no run starts.
    assert main([*line, "data=chat", "data.path=/nothing/there.jsonl", "resources=inline", "model=smollm2_135m"]) == 2


OTHERS = {
    "tune": ["data=chat", "data.path=/nothing.jsonl", "optimizer.lr=1e-4,1e-3"],
    "submit": ["data=chat", "data.path=/nothing.jsonl", "resources=cluster"],
    "jobs": ["list"],
    "serve": ["model=smollm2_135m"],
    "chat": ["model=smollm2_135m"],
    "predict": ["model=smollm2_135m", "data=chat", "data.path=/nothing.jsonl", "output_dir=x"],
    "evaluate": ["model=smollm2_135m", "output_dir=x"],
    "export": ["model=smollm2_135m", "export.output_dir=x"],
    "compare": ["a"],
    "import": ["a.yaml"],
}
"""Verb -> what it must be given."""


@pytest.mark.parametrize("verb", OTHERS)
def test_random_overrides_of_other_commands_are_taken_or_refused_and_their_hints_name_the_command(verb: str):
    draw = random.Random(verb)
    keys = [*(line.partition(":")[0] for line in load.defaults(verb)), *load.groups(), "foo", "hydra"]
    values = [
        "null",
        "-1",
        "1e400",
        "[]",
        "[0,0]",
        "[null]",
        "{a: b}",
        "a\0b",
        "caf\udce9",
        "${x}",
        "1,2",
        "9" * 30,
        "choice(1,2)",
    ]
    said: list[str] = []
    for _ in range(6):
        words = [f"{draw.choice(['', '', '+', '~'])}{draw.choice(keys)}={draw.choice(values)}" for _ in range(2)]
        try:
            command_line.load(command_line.parse(verb, [*OTHERS[verb], *words]))
        except UserError as error:
            said.append(str(error))
    assert said and "train --cfg job" not in " ".join(said)


@pytest.mark.parametrize("old", mistakes.RENAMED)
def test_a_setting_of_an_earlier_version_is_answered_with_its_new_name(capsys, old: str):
    said = answer(capsys, "quantization=fp8", f"{old}=[down_proj]", ROWS)
    assert said == f"error: {old} has another name now, {mistakes.RENAMED[old]}. Write {mistakes.RENAMED[old]}=...\n"


@pytest.fixture
def four_rows(tmp_path: Path) -> list[str]:
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "rows.jsonl").write_text(4 * row)
    return ["model=tiny_random", "resources=inline", f"data.path={tmp_path}/rows.jsonl", f"data.cache={tmp_path}/cache"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("hidden_sizee: 3", "Did you mean model.config.hidden_size?"),
        ("quantization_config: {load_in_4bit: true}", "Set quantization (bnb_nf4"),
        ("auto_map: {AutoModel: a.B}", "model.config.auto_map is not read here"),
        ("from_dict: 3", "model.config.from_dict is unknown to this model"),
        ("hidden_size: -1", "must be a config that transformers accepts"),
        ("num_hidden_layers: abc", "must be a config that transformers accepts"),
        ("torch_dtype: float7", "must be a config that transformers accepts"),
        ("id2label: 3", "must be a config that transformers accepts"),
        ("rope_parameters: 3", "must be a config that transformers accepts"),
        ("hidden_size: 10000000000000", "must make a model"),
        ("head_dim: 3", "model.config.head_dim must be even"),
        ("num_key_value_heads: 3", "must divide num_attention_heads, which is 4"),
        ("rope_theta: nan", "model.config.rope_theta must be a finite number"),
        ("rope_parameters: {rope_theta: [1.0, inf]}", "model.config.rope_parameters.rope_theta must be a finite number"),
    ],
)
def test_a_config_that_is_no_model_s_is_refused(capsys, four_rows: list[str], entry: str, said: str):
    assert said in answer(capsys, *four_rows, f"model.config={{{entry}}}")


@pytest.mark.parametrize("setting", ["data.eval_fraction=0.99", "data.eval_rows=4"])
def test_rows_that_are_all_held_out_are_said_before_anything_is_written(capsys, four_rows: list[str], setting: str):
    said = answer(capsys, *four_rows, setting)
    assert said.startswith(f"error: {setting.partition('=')[0]} must leave rows to train on, of which there are 4")


@pytest.mark.parametrize("place", ["", " ", "\0", "a\0b", "/", "//"])
@pytest.mark.parametrize("setting", ["output_dir", "data.cache"])
def test_a_folder_without_a_name_is_refused(capsys, four_rows: list[str], setting: str, place: str):
    assert f"{setting} must name a folder" in answer(capsys, *four_rows, f"{setting}={place}")


@pytest.mark.parametrize("setting", ["output_dir", "data.cache"])
def test_a_home_folder_of_nobody_who_is_here_is_refused(capsys, four_rows: list[str], setting: str):
    assert f"Write {setting}=./~no_such_user/x" in answer(capsys, *four_rows, f"{setting}=~no_such_user/x")
    assert "~no_such_user/rows.jsonl" in answer(capsys, *four_rows, "data.path=~no_such_user/rows.jsonl")
    named = load.load_config("train", [*four_rows, f"{setting}=./~no_such_user/x"])
    place = with_absolute_paths(named).output_dir if setting == "output_dir" else with_absolute_paths(named).data.cache
    assert place == str(Path("~no_such_user/x").absolute())


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "rows.jsonl", "a" * 300, "/" + "a/" * 3000])
def test_a_cache_that_can_not_be_and_a_path_that_is_too_long(capsys, tmp_path: Path, monkeypatch, place: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    words = ["prepare", "model=tiny_random", "data=chat", "resources=inline"]
    assert "data.cache must be a folder that can be written" in answer(capsys, *words, ROWS, f"data.cache={place}")
    if len(place) > 100:
        assert place[:100] in answer(capsys, *words, f"data.path={place}")
    assert [path.name for path in tmp_path.iterdir() if path.name != "here"] == ["rows.jsonl"]
