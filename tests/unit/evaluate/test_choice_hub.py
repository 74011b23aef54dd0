"""`evaluate.data` as a hub's data set, with huggingface_hub's own client, against a small server that answers as a hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from raytune_llm.errors import ConfigError
from raytune_llm.evaluate.choice_files import folder_of, read_task

COMMIT = "c" * 40
ROWS = "What is it?,a,b,c,d,D\n"
FILES = {
    "mmlu/mapping.json": json.dumps({"virology": {"name": "virology", "category": "Other"}}),
    "mmlu/data/test/virology_test.csv": ROWS,
    "mmlu/data/dev/virology_dev.csv": ROWS,
    "ceval/mapping.json": "{}",
}


class Answers(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        _, found, file = path.partition(f"/datasets/me/benchmarks/resolve/{COMMIT}/")
        if found and file in FILES:
            self.answer(FILES[file].encode())
        elif path.startswith("/api/datasets/me/benchmarks/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "me/benchmarks", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/datasets/me/benchmarks/tree/"):
            sizes = {name: (len(text.encode()), etag(text.encode())) for name, text in FILES.items()}
            files = [{"type": "file", "path": name, "size": size, "oid": oid} for name, (size, oid) in sizes.items()]
            self.answer(json.dumps(files).encode())
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
