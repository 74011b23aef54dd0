"""Models of which a file is damaged, cut off or another model's: an error that names model.path, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_llm import api
from raytune_llm.__main__ import main
from tests.runs import tiny_run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("run"), "train.max_steps=1", "adapter=none")
    return api.train(run).final


def holds(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def says(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def lacks_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(dict(list(weights.items())[1:]), folder / WEIGHTS, metadata={"format": "pt"})


def is_pickled(folder: Path, content: bytes = b"PK") -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def has_an_index(content: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(content)

    return change


def is_an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is a list": (holds("config.json", b"[]"), "argument after ** must be a mapping"),
    "config of text": (says("config.json", hidden_size="a"), "hidden_size"),
    "other shapes": (says("config.json", hidden_size=128), "must keep the shapes of the weights at model.path"),
    "more layers": (says("config.json", num_hidden_layers=9), "63 are missing"),
    "cut weights": (lambda folder: holds(WEIGHTS, (folder / WEIGHTS).read_bytes()[:999])(folder), "weights that can be read"),
    "empty weights": (holds(WEIGHTS, b""), "weights that can be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "must be a folder with weights"),
    "a weight is missing": (lacks_a_weight, "1 are missing"),
    "pickled": (is_pickled, "must be a folder with a model"),
    "a shard is missing": (has_an_index('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'), "No such file or directory"),
    "index is a list": (has_an_index("[]"), "weights that can be read"),
    "an adapter": (is_an_adapter, "Set adapter.path="),
    "tokenizer is a list": (holds("tokenizer.json", b"[]"), "holds no tokenizer"),
    "tokenizer's settings are a list": (holds("tokenizer_config.json", b"[]"), "holds no tokenizer"),
    "generation config is cut": (holds("generation_config.json", b"["), "generation_config.json can be read"),
    "generation config is a list": (holds("generation_config.json", b"[]"), "generation_config.json can be read"),
    "an end of text": (says("generation_config.json", eos_token_id="a"), "eos_token_id is 'a'"),
    "template is cut": (holds("chat_template.jinja", b"{% for"), "the chat template must write a question and its answer"),
    "template is empty": (holds("chat_template.jinja", b""), "the chat template must put a special token after an answer"),
    "template refuses": (holds("chat_template.jinja", b"{{ raise_exception('no') }}"), "question and its answer (no)"),
    "template reads what is not": (holds("chat_template.jinja", b"{{ messages[0].x.y }}"), "question and its answer"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_model_is_refused_and_nothing_is_written(capsys, model: Path, chat_rows, cache, tmp_path: Path, how: str):
    damage, said = DAMAGE[how]
    damage(Path(shutil.copytree(model, tmp_path / "model")))
    asked = ["model=hub", f"model.path={tmp_path}/model", "data=chat", f"data.path={chat_rows}", "data.max_length=256"]
    here = ["adapter=none", "resources=inline", "tracking=none", f"data.cache={cache}", f"output_dir={tmp_path}/o"]
    assert main([*asked, *here]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and str(tmp_path / "model") in error
    assert not (tmp_path / "o").exists()


def test_a_refused_command_leaves_the_description_of_the_run_before(model: Path, chat_rows: str, cache: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text("before\n")
    lacks_a_weight(Path(shutil.copytree(model, tmp_path / "model")))
    settings = ["model=hub", f"model.path={tmp_path}/model", "data=chat", f"data.path={chat_rows}", "adapter=none"]
    assert main([*settings, "resources=inline", "tracking=none", f"data.cache={cache}", f"output_dir={tmp_path}"]) == 2
    assert (tmp_path / "run.yaml").read_text() == "before\n"
