"""Benchmarks of a hub's data sets, with huggingface_hub's own client, against a small server that answers as a hub does."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.evaluate import choice_hub
from raytune_llm.evaluate.choice_files import ChoiceQuestion, read_task
from raytune_llm.evaluate.choice_hub import DATASETS, REVISION, downloaded, folder_of, read_parquet_task
from raytune_llm.evaluate.choices import tasks_of

COMMIT = "c" * 40
ROWS = "What is it?,a,b,c,d,D\n"
MINE = {
    "mmlu/mapping.json": json.dumps({"virology": {"name": "virology", "category": "Other"}}),
    "mmlu/data/test/virology_test.csv": ROWS,
    "mmlu/data/dev/virology_dev.csv": ROWS,
    "ceval/mapping.json": "{}",
}
SUBJECTS = json.loads((Path(choice_hub.__file__).parent / "subjects.json").read_text(encoding="utf-8"))


def parquet(rows: list[Mapping[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def rows_of(benchmark: str, subject: str) -> list[Mapping[str, Any]]:
    """Columns as the benchmark's own data set has them."""
    if benchmark == "mmlu":
        return [{"question": f"{subject}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": 3}]
    row = {"question": f"{subject}?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "D"}
    return [row if benchmark == "ceval" else {name.capitalize(): value for name, value in row.items()}]


def parquet_files(benchmark: str, *splits: str) -> dict[str, bytes]:
    subjects = [subject for category in SUBJECTS[benchmark].values() for subject in category]
    return {f"{one}/{split}/0000.parquet": parquet(rows_of(benchmark, one)) for one in subjects for split in splits}


DATA = {
    "me/benchmarks": {name: text.encode() for name, text in MINE.items()},
    "cais/mmlu": {**parquet_files("mmlu", "dev", "test"), "anatomy/auxiliary_train/0000.parquet": b"large"},
}
"""By data set and path."""


class Answers(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        name = next((name for name in DATA if f"/datasets/{name}/" in path), "")
        files, (_, _, asked) = DATA.get(name, {}), path.partition(f"/datasets/{name}/")
        if name == "cais/mmlu" and not asked.startswith((f"revision/{REVISION}", f"tree/{COMMIT}", f"resolve/{COMMIT}")):
            self.answer(b"{}", 404)
        elif (file := asked.removeprefix(f"resolve/{COMMIT}/")) in files:
            self.answer(files[file])
        elif asked.startswith("revision/"):
            self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in files]}).encode())
        elif asked.startswith("tree/"):
            listed = [{"type": "file", "path": one, "size": len(data), "oid": etag(data)} for one, data in files.items()]
            self.answer(json.dumps(listed).encode())
        else:
            self.answer(b"{}", 200 if path == "/" else 404)

    def answer(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HUGGINGFACE_CO_URL_TEMPLATE": f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_folders_of_the_tasks_are_read_from_a_hubs_data_set(hub):
    folder = folder_of("me/benchmarks", ["mmlu_test"])
    (subject,) = read_task("mmlu_test", folder)
    assert subject.questions[0].answer == "D" and not (folder / "ceval").exists()


def test_a_data_set_that_the_hub_does_not_have_is_named(hub):
    with pytest.raises(ConfigError, match=r"^evaluate\.data must be a folder, or a data set that the hub gives"):
        folder_of("me/nothing", ["mmlu_test"])


def test_a_folder_is_read_as_it_is(tmp_path):
    assert folder_of(str(tmp_path), ["mmlu_test"]) == tmp_path
    assert folder_of(str(tmp_path / "nothing"), ["mmlu_test"]) == tmp_path / "nothing"


def test_a_benchmark_without_files_is_read_from_its_data_set_on_the_hub_and_later_from_the_cache(hub, monkeypatch):
    settings = ["model=tiny_random", "evaluate.tasks=[mmlu]", "output_dir=out"]
    (task,) = tasks_of(load_config("evaluate", settings).evaluate)
    assert task.name == "mmlu_test" and task.lang == "en" and len(task.subjects) == 57
    anatomy = next(subject for subject in task.subjects if subject.key == "anatomy")
    assert (anatomy.name, anatomy.category, anatomy.questions[0].answer) == ("anatomy", "Other", "D")
    assert anatomy.examples == anatomy.questions == [ChoiceQuestion("anatomy?", dict(zip("ABCD", "abcd", strict=True)), "D")]
    assert not list(downloaded("mmlu_test").glob("anatomy/auxiliary_train/*"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert tasks_of(load_config("evaluate", settings).evaluate) == [task]


@pytest.mark.parametrize(
    ("task", "split"), [("mmlu_validation", "validation"), ("ceval_validation", "val"), ("cmmlu_test", "test")]
)
def test_a_folder_with_a_hubs_files_is_read_in_either_layout(tmp_path, task, split):
    """As the hub converts a data set, and as its authors upload it."""
    benchmark = task.partition("_")[0]
    for name, data in parquet_files(benchmark, "dev", split).items():
        subject, of_split, _ = name.split("/")
        file = tmp_path / benchmark / (name if subject < "m" else f"{subject}/{of_split}-00000-of-00001.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    settings = ["model=tiny_random", f"evaluate.tasks=[{task}]", f"evaluate.data={tmp_path}", "output_dir=out"]
    (found,) = tasks_of(load_config("evaluate", settings).evaluate)
    assert {subject.key for subject in found.subjects} == {one for names in SUBJECTS[benchmark].values() for one in names}
    assert all(subject.questions[0].question == f"{subject.key}?" for subject in found.subjects)
    assert all(subject.questions[0].answer == subject.examples[0].answer == "D" for subject in found.subjects)
    names = {"mmlu": ("us_foreign_policy", "us foreign policy"), "ceval": ("law", "法学"), "cmmlu": ("logical", "逻辑学")}
    assert names[benchmark] in {(subject.key, subject.name) for subject in found.subjects}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "holds no parquet file of the split test"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "can't be read"),
        (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "pointer of Git LFS"),
        (lambda file: file.write_bytes(parquet([{"question": "a"}])), "row 1 must have a question, the choices A to D"),
        (lambda file: file.write_bytes(parquet([{**rows_of("mmlu", "a")[0], "answer": 4}])), "row 1 must have a question"),
        (lambda file: pq.write_table(pa.Table.from_pylist(rows_of("mmlu", "a"))[:0], file), "holds no questions"),
    ],
)
def test_a_hubs_file_that_is_damaged_or_missing_is_named(tmp_path, damage, said):
    for name, data in parquet_files("mmlu", "dev", "test").items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    damage(tmp_path / "virology" / "test" / "0000.parquet")
    with pytest.raises(DataError, match=said) as raised:
        read_parquet_task("mmlu_test", tmp_path)
    assert "virology" in str(raised.value)


@pytest.mark.parametrize("task", ["ceval_validation", "mmlu_test"])
def test_without_a_hub_it_is_said_which_data_set_to_fetch_and_where_to_put_it(monkeypatch, task):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    name = task.partition("_")[0]
    with pytest.raises(ConfigError) as raised:
        downloaded(task)
    for said in ("evaluate.data", "no hub answers at http://127.0.0.1:1", f"hf download {DATASETS[name]}", f"FOLDER/{name}"):
        assert said in str(raised.value)


def test_a_data_set_that_the_hub_refuses_is_named(hub):
    with pytest.raises(ConfigError, match=r"^evaluate\.data must name a folder .*: the hub doesn't give haonan-li/cmmlu"):
        downloaded("cmmlu_test")
