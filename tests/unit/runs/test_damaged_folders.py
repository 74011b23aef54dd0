"""Folders of runs that were damaged: never believed, never a traceback, and what is sound in them is used."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llm import api
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, DataError, UserError
from raytune_llm.train.checkpoint_files import complete_steps
from tests.group import metrics
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def whole(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Four steps, with checkpoints of steps 2 and 4."""
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("whole"), "train.max_steps=4", "checkpoint.every_steps=2")
    api.train(run)
    return run


def copy_of(whole: TrainRun, folder: Path) -> TrainRun:
    shutil.copytree(whole.output_dir, folder, dirs_exist_ok=True)
    return replace(whole, output_dir=str(folder))


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "inverted":
            at = len(content) // 2
            path.write_bytes(content[:at] + bytes(255 - byte for byte in content[at : at + 8]) + content[at + 8 :])
        case "list":
            path.write_text("[]")


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "inverted"])
@pytest.mark.parametrize("name", ["state/__0_0.distcp", "state/.metadata", "progress.json"])
def test_a_damaged_checkpoint_is_passed_over_and_the_numbers_are_those_of_the_undisturbed_run(
    whole: TrainRun, tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
):
    run = copy_of(whole, tmp_path)
    (tmp_path / "finished.json").unlink()
    damaged(tmp_path / "checkpoints/step-4" / name, how)
    result = api.train(run)
    assert result.resumed_from == 2
    assert "step-4 can't be used" in caplog.text and "using step-2" in caplog.text
    losses = [[record["loss"] for record in metrics(str(folder)) if "loss" in record] for folder in (whole.output_dir, tmp_path)]
    assert losses[0] == losses[1]


def test_where_every_checkpoint_is_damaged_it_is_said(whole: TrainRun, tmp_path: Path):
    run = copy_of(whole, tmp_path)
    (tmp_path / "finished.json").unlink()
    for step in (2, 4):
        damaged(tmp_path / f"checkpoints/step-{step}/progress.json", "list")
    with pytest.raises(DataError, match=r"no usable checkpoint.*resume=never"):
        api.train(run)


def test_folders_of_other_names_are_left_alone(whole: TrainRun, tmp_path: Path):
    run = copy_of(whole, tmp_path)
    for name in ("step-20-backup", "step-x", "step-"):
        shutil.copytree(tmp_path / "checkpoints/step-4", tmp_path / "checkpoints" / name)
    assert complete_steps(tmp_path / "checkpoints") == [2, 4]
    assert api.train(run).already_done


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_finished_folder_knows_which_run_finished_in_it(whole: TrainRun, tmp_path: Path, checkpoints: bool):
    run = copy_of(whole, tmp_path)
    if not checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
    assert api.train(run).already_done
    other = replace(run, optimizer=replace(run.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"holds another run; what changed: optimizer\.lr"):
        api.train(other)


@pytest.mark.parametrize("how", ["gone", "empty", "inverted"])
def test_a_damaged_final_model_is_written_again(whole: TrainRun, tmp_path: Path, how: str):
    run = copy_of(whole, tmp_path)
    weights = next((tmp_path / "final").glob("*.safetensors"))
    before = weights.read_bytes()
    damaged(weights, how)
    result = api.train(run)
    assert not result.already_done and weights.read_bytes() == before
    assert api.train(run).already_done


@pytest.mark.parametrize("how", ["gone", "empty", "list"])
def test_a_final_model_of_which_nothing_says_who_wrote_it_is_kept(whole: TrainRun, tmp_path: Path, how: str):
    run = copy_of(whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    damaged(tmp_path / "finished.json", how)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"output_dir holds a final/ that would be replaced.*resume=never"):
        api.train(run)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["finished.json", "summary.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "list"])
def test_broken_marks_of_the_end_are_no_end(whole: TrainRun, tmp_path: Path, name: str, how: str):
    run = copy_of(whole, tmp_path)
    damaged(tmp_path / name, how)
    assert not api.train(run).already_done
    json.loads((tmp_path / name).read_text())


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_a_user_s_error_or_repaired(whole: TrainRun, tmp_path: Path, seed: int):
    draw = random.Random(seed)
    run = copy_of(whole, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in draw.sample(files, 4):
        damaged(path, draw.choice(["gone", "empty", "cut", "inverted", "list"]))
    with suppress(UserError):
        api.train(run)
