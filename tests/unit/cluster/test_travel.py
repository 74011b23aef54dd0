"""A run's paths on a cluster: those of files that travel, and those that mean something there."""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_llm import load_config
from raytune_llm.cluster import job_client, jobs
from raytune_llm.cluster.jobs import SETTINGS, Job, Jobs, address_of, open_to_all
from raytune_llm.cluster.package import files_of
from raytune_llm.cluster.submit import job_of
from raytune_llm.cluster.travel import on_cluster
from raytune_llm.config import command_line, load
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.run import as_train_run
from raytune_llm.config.sweep import load_sweep
from raytune_llm.errors import ConfigError, ResourceError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("data/rows.jsonl", "left_out.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def there(folder: Path, *overrides: str) -> Any:
    run = load_config("submit", ["model=tiny_random", "output_dir=/shared/run", *overrides])
    return on_cluster(run, folder, files_of(folder, ["left_out.jsonl"], max_mib=100))


@pytest.mark.parametrize("path", ["data/rows.jsonl", "./data/rows.jsonl", "{folder}/data/rows.jsonl"])
def test_a_file_that_travels_is_found_in_the_job_s_folder(folder, path):
    assert there(folder, f"data.path={path.format(folder=folder)}").data.path == "data/rows.jsonl"


def test_a_folder_that_travels_is_found_there(folder):
    assert there(folder, "data.path=data").data.path == "data"


def test_a_path_is_found_by_any_way_that_leads_to_it(folder, monkeypatch):
    (folder / "link.jsonl").symlink_to("data/rows.jsonl")
    (folder / "linked").symlink_to("data")
    for path in ("data/../data/rows.jsonl", "linked/rows.jsonl", f"../{folder.name}/data/rows.jsonl"):
        assert there(folder, f"data.path={path}").data.path in ("data/rows.jsonl", "link.jsonl")
    assert there(folder, "data.path=linked").data.path == "data"
    monkeypatch.chdir(folder / "data")
    assert there(folder.joinpath("data", ".."), "data.path=rows.jsonl").data.path in ("data/rows.jsonl", "link.jsonl")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("outside/rows.jsonl", "a link leads out of submit.folder"),
        ("../none.jsonl", "it is not in submit.folder"),
        ("data/none.jsonl", "it is not in submit.folder"),
        ("left_out.jsonl", "git or submit.ignore leaves it out"),
        ("dangling", "it is not in submit.folder"),
    ],
)
def test_why_a_file_is_not_sent_is_told(folder, tmp_path_factory, path, why):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "rows.jsonl").touch()
    (folder / "outside").symlink_to(outside)
    (folder / "dangling").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=rf"data\.path must be sent with the job or .*: {why}"):
        there(folder, f"data.path={path}")


def test_rows_of_a_folder_that_would_be_missing_in_the_job_are_refused(folder):
    (folder / "data" / ".hidden").touch()
    for place in ("data/other.jsonl", "data/more/one.jsonl"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("{}\n")
    run = load_config("submit", ["model=tiny_random", "output_dir=/shared/run", "data.path=data"])
    for ignore in ([], ["left_out.jsonl"]):
        assert on_cluster(run, folder, files_of(folder, ignore, max_mib=100)).data.path == "data"
    with pytest.raises(ConfigError, match=r"data\.path must be sent whole: \S+more/one\.jsonl and 1 more would not be"):
        on_cluster(run, folder, files_of(folder, ["o*.jsonl"], max_mib=100))


def test_rows_that_dataset_info_names_are_refused_where_they_are_not_sent(folder):
    (folder / "data" / "dataset_info.json").write_text(
        json.dumps({"a": {"file_name": "rows.jsonl"}, "b": {"file_name": "b.jsonl"}})
    )
    (folder / "data" / "b.jsonl").write_text("{}\n")
    files = files_of(folder, ["b.jsonl"], max_mib=100)

    def sent(name: str) -> Any:
        words = [
            "model=tiny_random",
            "output_dir=/shared/run",
            "data.path=null",
            "data.dataset_info=data",
            f"data.names=[{name}]",
        ]
        return job_of(load_config("submit", words), folder, files)

    sent("a")
    with pytest.raises(ConfigError, match=r"file_name of b in data/dataset_info\.json must be sent whole: \S+b\.jsonl would not"):
        sent("b")


def test_a_job_reads_its_run_from_its_environment_and_leaves_no_file(folder, tmp_path, monkeypatch):
    run = load_config("submit", ["model=tiny_random", "output_dir=/shared/run", "data.path=data"])
    sent = job_of(run, folder, files_of(folder, [], max_mib=100))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for name, value in sent.env.items():
        monkeypatch.setenv(name, value)
    python, _, _, module, *words = shlex.split(sent.command)
    assert (python, module) == ("python", "raytune_llm")
    job = command_line.load(command_line.parse(words[0], words[1:]))
    assert job == replace(as_train_run(on_cluster(run, folder, files_of(folder, [], max_mib=100))), log_format="json")
    assert not list((tmp_path / "temporary").iterdir())
    for junk in ("", "no base64", "AAAA", sent.env[SETTINGS][:40], "H4sI" + "A" * 40):
        monkeypatch.setenv(SETTINGS, junk)
        with pytest.raises(ConfigError, match="--config-env must name an environment variable with a packed config"):
            command_line.load(command_line.parse(words[0], words[1:]))


def test_examples_travel_with_the_package(folder):
    run = there(folder, "+experiment=sft_full_tiny")
    assert run.data.path.startswith("raytune_llm/examples/")


def test_an_image_has_examples_of_its_own_wherever_its_package_is(folder, monkeypatch, tmp_path):
    words = ["+experiment=sft_full_tiny", "output_dir=/shared/run", "submit.image=mine:1"]
    run = on_cluster(load_config("submit", words), folder, {})
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.yaml").write_text(to_yaml(as_train_run(run)))
    monkeypatch.setattr(load, "EXAMPLES", Path("/opt/examples"))
    in_image = load_config("train", config_dir=tmp_path / "job", config_name="run")
    assert in_image.data.path == "/opt/examples/alpaca.jsonl"


def test_no_file_is_sent_to_an_image(folder):
    words = ["model=tiny_random", "output_dir=/shared/run", "data.path=data/rows.jsonl", "submit.image=mine:1"]
    run = load_config("submit", words)
    with pytest.raises(ConfigError, match=r"data\.path must be sent .* with submit\.image no file is sent, got 'data/rows"):
        on_cluster(run, folder, {})


def test_tokens_may_be_beside_a_run_in_an_object_store(folder):
    assert there(folder, "data.path=data", "output_dir=s3://bucket/run").data.cache == "s3://bucket/run/tokens"


@pytest.mark.parametrize("path", ["/shared/rows.jsonl", "s3://bucket/rows.jsonl", "squad", "owner/squad"])
def test_what_the_cluster_has_stays_as_it_is(folder, path):
    assert there(folder, f"data.path={path}").data.path == path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=left_out.jsonl", r"data\.path must be sent .*git or submit\.ignore leaves it out, got 'left_out"),
        ("data.path=no_such.jsonl", r"data\.path must be sent .*not in submit\.folder"),
        ("data.path=../rows.jsonl", r"data\.path must be sent .*not in submit\.folder"),
        ("model.path=~/models/mine", r"model\.path must be sent"),
        ("output_dir=outputs/run", r"output_dir must be an absolute path .* Set output_dir=/shared/"),
        ("data.cache=tokens", r"data\.cache must be an absolute path"),
    ],
)
def test_what_means_nothing_there_is_refused(folder, override, said):
    with pytest.raises(ConfigError, match=said):
        there(folder, "data.path=data/rows.jsonl", override)


def test_a_job_s_driver_joins_its_cluster(folder):
    with pytest.raises(ConfigError, match="resources must be cluster") as refused:
        load_config("submit", ["data.path=data", "resources=inline"])
    assert refused.value.instead == "resources=cluster"


def test_an_image_brings_its_packages():
    with pytest.raises(ConfigError, match=r"submit\.requirements can't be combined with submit\.image"):
        load_config("submit", ["data.path=x", "submit.image=mine:1", "submit.requirements=pinned"])


def test_the_address_is_the_dashboard_s(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"submit\.address must be given"):
        address_of(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265/")
    assert address_of(None) == "http://10.0.0.1:8265"
    assert address_of("http://other:1") == "http://other:1"
    for wrong in ("10.0.0.1:6379", "ray://head:10001", "http://", "http://[::1", "http://head:port", "http://head:0"):
        with pytest.raises(ConfigError, match=r"submit\.address must be the address of the cluster's dashboard, got "):
            load_config("jobs", [f"submit.address={wrong}"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "10.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_API_SERVER_ADDRESS must be the address of the cluster's dashboard, got '10"):
        address_of(None)


def test_why_no_dashboard_answers_is_told():
    with socket.socket() as silent:  # it has the port, and does not listen
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match=r"answers at \S+ \(Connection refused\)\. Start the head"):
            Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as without_tls:
        threading.Thread(target=lambda: without_tls.accept()[0].sendall(b"HTTP/1.1 200 OK\r\n\r\n"), daemon=True).start()
        with pytest.raises(ResourceError, match=r"\(\[SSL.*\)\. Write http:// for a dashboard without TLS"):
            Jobs(f"https://127.0.0.1:{without_tls.getsockname()[1]}")


def test_an_address_of_others_without_a_token_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert open_to_all("http://127.0.0.1:8265") is open_to_all("http://localhost:8265") is None
    assert "RAY_AUTH_MODE=token" in (open_to_all("http://head:8265") or "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert open_to_all("http://head:8265") is None


def test_asking_for_a_cluster_s_jobs_leaves_a_ray_that_is_loaded_as_it_is(monkeypatch):
    import ray  # noqa: F401

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(ResourceError, match="127"):
        Jobs("http://127.0.0.1:9")
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("FAILED", -15, 143),
        ("STOPPED", None, 130),
        ("STOPPED", 143, 143),
    ],
)
def test_the_driver_s_exit_code_is_passed_on(status, code, outcome):
    job = Job(id="a", run="a", status=status, message="", exit_code=code, started=None, ended=None, output_dir=None)
    assert job.outcome == outcome
    assert ("memory runs out" in job.reason) == (code == -9)


def test_a_stranger_s_job_can_t_write_commands_to_a_terminal():
    details = SimpleNamespace(
        submission_id="a", metadata={"run": "\x1b[2Jmine", "output_dir": "/x\r"}, status="FAILED", message="a\x1b]0;b\nc",
        driver_exit_code=None, start_time=None, end_time=None,
    )  # fmt: skip
    job = jobs._job(details)
    assert (job.run, job.output_dir, job.message) == ("?[2Jmine", "/x?", "a?]0;b\nc")


PIP = """runtime_env setup failed: Failed to set up runtime environment.
Could not create the actor because its associated runtime env failed to be created.
[Node 10.0.0.2] Traceback (most recent call last):
  File "pip.py", line 252, in _install_pip_packages
ray.SubprocessCalledProcessError: Run cmd[9] failed with the following details.
Last 50 lines of stdout:
    Looking in indexes: https://pypi.org/simple
    ERROR: Could not find a version that satisfies the requirement nosuch==9.9 (from versions: none)
    ERROR: No matching distribution found for nosuch==9.9
"""


def test_the_package_that_pip_does_not_find_is_why_a_job_failed():
    job = Job(id="a", run="a", status="FAILED", message=PIP, exit_code=None, started=None, ended=None, output_dir=None)
    assert job.reason.endswith("(from versions: none); No matching distribution found for nosuch==9.9")
    assert "No module named podman" in replace(job, message="runtime_env setup failed: a\nE: No module named podman.").reason


def test_what_submit_sends(folder):
    run = ["model=tiny_random", "data.path=data/rows.jsonl", "output_dir=/shared/run", "submit.address=http://head:8265"]
    as_train, plain = (command_line.load(command_line.parse("submit", [*words, *run])) for words in (["train"], []))
    assert as_train == plain
    with pytest.raises(ConfigError, match=r"submit sends runs and, .*, got 'predict'\. For example, ray job submit"):
        command_line.load(command_line.parse("submit", ["predict", *run]))


def test_tokens_go_where_the_cluster_sees_them_not_to_this_machine_s_home(folder):
    assert there(folder, "data.path=data").data.cache == "/shared/run/tokens"
    assert there(folder, "+experiment=sft_full_tiny").data.cache == "/shared/run/tokens"


def sweep_words(folder: Path, *words: str) -> list[str]:
    """What follows `tune` in the command of a submitted sweep's job."""
    argv = ["model=tiny_random", "output_dir=/shared/sweep", "submit.address=http://head:8265", "optimizer.lr=1e-3,1e-2"]
    argv += ["data.eval_fraction=0.5", *words]
    sub = command_line.load(command_line.parse("submit", ["tune", *argv]))
    sent = job_of(sub.sweep, folder, files_of(folder, ["left_out.jsonl"], max_mib=100))
    return shlex.split(sent.command)[5:]


def test_a_sweep_travels_as_its_words_with_the_paths_of_the_job(folder):
    sent = sweep_words(folder, f"data.path={folder}/data/rows.jsonl", "tune=grid")
    assert sent[:3] == ["model=tiny_random", "output_dir=/shared/sweep", "optimizer.lr=1e-3,1e-2"]
    assert sent[-2:] == ["data.path='data/rows.jsonl'", "log_format=json"] and "resources=cluster" in sent
    there = load_sweep(sent)
    assert (there.base.data.path, there.base.data.cache) == ("data/rows.jsonl", "/shared/sweep/tokens")
    assert [point["optimizer.lr"] for point in there.planned] == [1e-3, 1e-2]


def test_what_the_package_carries_is_named_by_the_same_words_there(folder):
    assert not any(word.startswith("data.path") for word in sweep_words(folder, "+experiment=sft_full_tiny"))


def test_an_experiment_of_ones_own_travels_with_its_folder(folder):
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
    sent = sweep_words(folder, "--config-dir", str(folder / "conf"), "+experiment=mine", "data.path=data")
    assert sent[:2] == ["--config-dir", "conf"]
    with pytest.raises(ConfigError, match="--config-dir must be a folder"):
        sweep_words(folder, "--config-dir", "/usr", "data.path=data")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=left_out.jsonl"], r"data\.path must be sent"),
        (["data.path=data", "adapter=lora", "adapter.path=null,./left_out.jsonl"], r"adapter\.path must be sent"),
        (["data.path=data", "output_dir=outputs/sweep"], r"output_dir must be an absolute path"),
        (["data.path=data", "resources=inline"], "resources must be cluster"),
        (["data.path=data", "optimizer.lr=1e-3"], "optimizer.lr is given twice"),
    ],
)
def test_a_sweep_that_can_t_run_there_is_refused_here(folder, words, said):
    with pytest.raises(ConfigError, match=said):
        sweep_words(folder, *words)


def test_an_address_that_takes_connections_and_says_nothing_is_no_dashboard(monkeypatch):
    monkeypatch.setattr(job_client, "ANSWERS_WITHIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ResourceError, match=rf"no Ray dashboard answers at {address} \(.*timed out"):
            Jobs(address)
