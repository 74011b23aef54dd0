"""Runs whose output folder is in an object store: a store in memory, and S3 as a server in this process plays it."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError, DataError, ResourceError, RunLost
from raytune_llm.object_store import RemoteFolder
from raytune_llm.report.metrics import read_metrics
from raytune_llm.report.updates import Notice, RunStarted
from raytune_llm.runs import owner
from raytune_llm.runs.remote_output import check_writable, work_folder
from raytune_llm.train.checkpoint_files import PROGRESS
from raytune_llm.train.remote_checkpoints import RemoteCheckpoints
from tests.runs import PowerCut, cut_at, tiny_run
from tests.s3 import s3_bucket

MEASURED = {"tokens_per_s", "memory_gib", "mfu"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket("outputs") as address:
        yield address


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Machines differ by their cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    return tmp_path


@pytest.fixture
def memory() -> str:
    return f"memory://outputs/{uuid.uuid4().hex}"


def numbers(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name not in MEASURED}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def run_of(rows: str, cache: str, output: object, *overrides: str) -> TrainRun:
    return tiny_run(rows, cache, output, "checkpoint.every_steps=2", "train.max_steps=6", "train.sample_rows=1", *overrides)


@pytest.fixture(scope="module")
def plain(chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    api.train(run_of(chat_rows, cache, folder))
    return folder


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_a_run_resumes_on_another_machine_from_what_is_in_the_store(
    store: str,
    plain: Path,
    chat_rows: str,
    cache: str,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    address = request.getfixturevalue("memory") if store == "memory" else f"{request.getfixturevalue('s3')}/a/run"
    run = run_of(chat_rows, cache, address, f"checkpoint.asynchronous={str(store == 's3').lower()}")
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(5)])
    remote = RemoteFolder(address)
    there = remote.files()
    assert {name for name in there if name.endswith("COMPLETE")} == {f"checkpoints/step-{n}/COMPLETE" for n in (2, 4)}
    assert owner.LOCK not in there, "whoever failed owns the folder no more"

    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "other"))
    notices: list[str] = []
    result = api.train(run, on_update=lambda news: notices.append(news.text) if isinstance(news, Notice) else None)
    assert result.resumed_from == 4 and any(address in line for line in notices)
    assert numbers(result.output_dir) == numbers(plain)
    assert sorted(path.name for path in (plain / "final").iterdir()) == sorted(path.name for path in result.final.iterdir())
    assert (result.final / "adapter_model.safetensors").read_bytes() == (
        plain / "final" / "adapter_model.safetensors"
    ).read_bytes()
    there = remote.files()
    assert {"run.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "summary.json", "finished.json"} <= there.keys()
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"step-4", "step-6"}, "checkpoint.keep=2"
    assert f"output_dir: {address}" in (remote.read("run.yaml") or b"").decode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "third"))
    again = api.train(run)
    assert again.already_done and again.final.is_dir()


def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_a_half_written_one_swept(
    chat_rows: str, cache: str, own_cache: Path, memory: str, caplog: pytest.LogCaptureFixture
):
    run = run_of(chat_rows, cache, memory)
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(5)])
    remote = RemoteFolder(memory)
    state = "checkpoints/step-4/state/__0_0.distcp"
    content = remote.read(state)
    assert content is not None
    remote.write(state, b"x" + content[1:])
    remote.write("checkpoints/step-9/state/__0_0.distcp", b"half of it")
    shutil.rmtree(work_folder(memory))
    assert api.train(run).resumed_from == 2
    assert "has other bytes than were written" in caplog.text
    assert not any(name.startswith("checkpoints/step-9/") for name in remote.files())


def test_tokens_and_reference_tables_may_be_in_the_store_too(
    s3: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """As `submit` sets it: data.cache is a folder of output_dir."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "say {n}", "chosen": "yes {n}", "rejected": "no"}
    pairs.write_text("\n".join(json.dumps({name: text.format(n=n) for name, text in row.items()}) for n in range(24)))
    words = ("stage=dpo", "data=prompt_completion_pairs", "data.packing=false", "stage.reference=precomputed")
    address = f"{s3}/b/run"

    def run_with(cache: object, output: object, *more: str) -> TrainRun:
        return tiny_run(str(pairs), str(cache), output, *words, "checkpoint.every_steps=2", "train.max_steps=4", *more)

    plain = api.train(run_with(tmp_path / "tokens", tmp_path / "plain"))
    run = run_with(f"{address}/tokens", address)
    with pytest.raises(PowerCut):
        api.train(run, sinks=[cut_at(3)])
    remote = RemoteFolder(address)
    tokens = {name for name in remote.files() if name.startswith("tokens/")}
    assert {name.rpartition("/")[2] for name in tokens} == {"manifest.json", "shard-00000.arrow", "keys.npy", "values.npy"}

    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache / "other"))
    news: list[object] = []
    result = api.train(run, on_update=news.append)
    assert result.resumed_from == 2 and numbers(result.output_dir) == numbers(plain.output_dir)
    assert any("reference: read from" in choice for one in news if isinstance(one, RunStarted) for choice in one.choices)
    assert not (work_folder(address) / "tokens").exists(), "they are copied by themselves"

    again = api.train(run_with(f"{address}/tokens", address, "resume=never", "train.max_steps=1"))
    assert again.resumed_from is None and {name for name in remote.files() if name.startswith("tokens/")} == tokens


def test_resume_never_keeps_nothing_of_what_was_in_the_store(chat_rows: str, cache: str, own_cache: Path, memory: str):
    with pytest.raises(PowerCut):
        api.train(run_of(chat_rows, cache, memory), sinks=[cut_at(5)])
    with pytest.raises(ConfigError, match=r"output_dir holds another run; what changed: optimizer\.lr.*got 'memory://outputs/"):
        api.train(run_of(chat_rows, cache, memory, "optimizer.lr=2e-3"))
    result = api.train(run_of(chat_rows, cache, memory, "optimizer.lr=2e-3", "resume=never", "train.max_steps=2"))
    assert result.resumed_from is None and result.summary.steps == 2
    assert {name.split("/")[1] for name in RemoteFolder(memory).files() if name.startswith("checkpoints/")} == {"step-2"}


ELSEWHERE = json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "token": "x"}).encode()


def test_a_folder_of_another_host_is_refused_while_that_renews_its_lock_and_taken_once_it_is_old(
    chat_rows: str, cache: str, own_cache: Path, memory: str, monkeypatch: pytest.MonkeyPatch
):
    remote = RemoteFolder(memory)
    run = run_of(chat_rows, cache, memory, "train.max_steps=1")
    monkeypatch.setattr(owner, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(owner, "CLOCK_STEP_S", 0.0)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.15):
            remote.write(owner.LOCK, ELSEWHERE)

    remote.write(owner.LOCK, ELSEWHERE)
    other = threading.Thread(target=renew)
    other.start()
    try:
        with pytest.raises(ConfigError, match="process 7 on elsewhere"):
            api.train(run)
    finally:
        ended.set()
        other.join()
    assert set(remote.files()) == {owner.LOCK}
    monkeypatch.setattr(owner, "STALE_AFTER_S", 0.5)
    assert api.train(run).summary.steps == 1


def test_a_run_whose_folder_another_host_took_ends_and_writes_no_more_there(
    chat_rows: str, cache: str, own_cache: Path, memory: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, "RENEWED_EVERY_S", 0.05)
    remote = RemoteFolder(memory)

    def take(record: Mapping[str, Any]) -> None:
        if record["step"] == 3:
            remote.write(owner.LOCK, ELSEWHERE)
            time.sleep(20)  # cut short

    with pytest.raises(RunLost, match=r"process 7 on elsewhere has taken memory://"):
        api.train(run_of(chat_rows, cache, memory), sinks=[take])
    there = remote.files()
    assert remote.read(owner.LOCK) == ELSEWHERE
    assert "run.yaml" not in there and "checkpoints/step-2/COMPLETE" in there and "checkpoints/step-4/COMPLETE" not in there


def test_of_two_writers_of_a_checkpoint_one_completes_it(own_cache: Path, memory: str):
    def complete(checkpoints: RemoteCheckpoints, folder: Path) -> None:
        (folder / "step-2" / "state").mkdir(parents=True, exist_ok=True)
        (folder / "step-2" / PROGRESS).write_text("{}")
        checkpoints.complete(2)

    places = [own_cache / name for name in ("a", "b")]
    one, other = (RemoteCheckpoints(RemoteFolder(memory), place) for place in places)
    complete(one, places[0])
    complete(one, places[0])  # after an answer that was lost
    with pytest.raises(RunLost, match=r"another process has written the checkpoint step-2"):
        complete(other, places[1])
    one.remove(2)
    complete(other, places[1])


def test_what_can_not_work_is_refused_before_anything_is_prepared(
    s3: str, chat_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    cache = tmp_path / "tokens"
    with pytest.raises(ConfigError, match=r"output_dir must be a folder that can be written .*bucket.*s3://no-such-bucket/x"):
        api.train(run_of(chat_rows, str(cache), "s3://no-such-bucket/x"))
    assert not cache.exists()


def test_a_copy_that_can_not_be_written_is_refused_by_what_sets_its_place(memory: str, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=rf"this machine's copy of {memory} must be a folder .*XDG_CACHE_HOME"):
        check_writable(memory)


def test_what_is_not_the_run_s_is_not_copied_and_stays_even_with_resume_never(
    chat_rows: str, cache: str, own_cache: Path, memory: str
):
    """Such as another run in a folder below this one."""
    remote = RemoteFolder(memory)
    others = ("other/checkpoints/step-2/COMPLETE", "other/final/model.safetensors", "notes.txt", "tokens/x/manifest.json")
    for name in others:
        remote.write(name, b"mine")
    for words in ((), ("resume=never",)):
        result = api.train(run_of(chat_rows, cache, memory, "train.max_steps=1", *words))
        assert result.resumed_from is None and {name: remote.read(name) for name in others} == dict.fromkeys(others, b"mine")
        assert not any((work_folder(memory) / name).exists() for name in others)


def test_a_refused_command_with_resume_never_removes_nothing(
    chat_rows: str, cache: str, own_cache: Path, memory: str, tmp_path: Path
):
    api.train(run_of(chat_rows, cache, memory, "train.max_steps=2"))
    remote = RemoteFolder(memory)
    there = {name: remote.read(name) for name in remote.files()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": []}\n' * 9)
    with pytest.raises(DataError):
        api.train(run_of(str(broken), cache, memory, "resume=never"))
    assert {name: remote.read(name) for name in remote.files()} == there


def test_a_broken_mark_of_the_end_in_the_store_is_no_end(chat_rows: str, cache: str, own_cache: Path, memory: str):
    content = b"[]"
    run = run_of(chat_rows, cache, memory, "train.max_steps=2")
    api.train(run)
    remote = RemoteFolder(memory)
    remote.write("finished.json", content)
    again = api.train(run)
    assert again.resumed_from == 2 and not again.already_done
    assert "final/adapter_model.safetensors" in json.loads(remote.read("finished.json") or b"")["files"]
    remote.write("finished.json", content)
    remote.remove("checkpoints")
    model = remote.read("final/adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"output_dir holds a final/ that would be replaced"):
        api.train(run)
    assert model is not None and remote.read("final/adapter_model.safetensors") == model


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("tune", ["data.path=x", "output_dir=s3://b/x"]),
        ("predict", ["data.path=x", "model=tiny_random", "output_dir=s3://b/x"]),
        ("evaluate", ["model=tiny_random", "evaluate.tasks=[mmlu_test]", "evaluate.data=x", "output_dir=s3://b/x"]),
        ("export", ["export.run=x", "export.output_dir=s3://b/x"]),
    ],
)
def test_verbs_that_need_a_file_system_say_so(verb: str, words: list[str]):
    with pytest.raises(ConfigError, match="must be on a file system"):
        load_config(verb, words)


@pytest.mark.parametrize(
    ("verb", "words", "setting"),
    [
        ("export", ["export.run=s3://b/r", "export.output_dir=x"], "export.run"),
        (
            "export",
            ["model=hub", "model.path=a/b", "export.adapters={x: s3://b/r}", "export.output_dir=x"],
            "export.adapters",
        ),
        ("predict", ["predict.run=s3://b/r", "data.path=x", "output_dir=x"], "predict.run"),
        ("predict", ["model=tiny_random", "predict.adapters={x: s3://b/r}", "data.path=x", "output_dir=x"], "predict.adapters"),
        ("evaluate", ["evaluate.models=[s3://b/r]", "evaluate.tasks=[mmlu_test]", "output_dir=x"], "evaluate.models"),
        ("serve", ["model=tiny_random", "serve.adapters={x: s3://b/r/final}"], "serve.adapters"),
        ("train", ["model=tiny_random", "data.path=x", "adapter.path=s3://b/r/final"], "adapter.path"),
        ("train", ["model=hub", "model.path=gs://b/m", "data.path=x"], "model.path"),
    ],
)
def test_what_is_only_read_from_a_file_system_is_refused_by_name(verb: str, words: list[str], setting: str):
    with pytest.raises(ConfigError, match=rf"{setting} must be on a file system, got '(s3|gs)://b.*Copy it to this machine"):
        load_config(verb, words)


@pytest.mark.parametrize("address", ["s3://", "s3:/bucket/folder", "s3:///folder", "S3://bucket/folder"])
@pytest.mark.parametrize("setting", ["output_dir", "data.cache"])
def test_an_address_without_a_bucket_is_refused_and_not_taken_for_a_folder(setting: str, address: str):
    with pytest.raises(ConfigError, match=rf"{setting} must be a folder, or an address such as s3://bucket/folder"):
        load_config("train", ["model=tiny_random", "data.path=x", f"{setting}={address}"])
