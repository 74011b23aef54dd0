"""`export.push` with huggingface_hub's own client, against a small server that answers as a hub does."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, ResourceError
from tests.models import saved_llama

TOKEN = "hf_that_may_write"


class Hub(ThreadingHTTPServer):
    """Of one user, `me`, who is in the organization `us`. Files of safetensors are uploaded apart, as large files are."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.role, self.full, self.hangs_up = "write", False, False
        self.private: dict[str, bool] = {}
        """By repository."""
        self.files: dict[str, bytes] = {}
        """By repository/file."""
        self.large: dict[str, bytes] = {}
        """By their hash."""
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Any  # a Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.answer(None)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            user = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.server.role}}}
            self.answer({"type": "user", **user})
        elif "/tree/" in path:
            repo = path.removeprefix("/api/models/").partition("/tree/")[0]
            found = {name.removeprefix(f"{repo}/"): data for name, data in self.server.files.items() if name.startswith(repo)}
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in found.items()])
        else:
            self.answer({"error": path}, 404)

    def do_PUT(self) -> None:
        self.server.large[self.path.removeprefix("/large/")] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        repo = path.removeprefix("/api/models/").partition("/preupload")[0].partition("/commit")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.server.private
            self.server.private.setdefault(repo, asked["visibility"] == "private")
            self.answer({"url": f"{self.server.url}/{repo}", "name": repo}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer({"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]})
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            places = [{**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}} for one in objects]
            self.answer({"transfer": "basic", "objects": places})
        elif self.server.hangs_up:
            self.close_connection = True
        elif self.server.full:
            self.answer({"error": "Your storage is full"}, 403)
        else:
            self.commit(repo, [json.loads(line) for line in body.splitlines()])

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.server.messages.append(value["summary"])
            elif kind == "file":
                self.server.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                self.server.files[f"{repo}/{value['path']}"] = self.server.large[value["oid"]]
            else:
                assert kind == "deletedFile"
                del self.server.files[f"{repo}/{value['path']}"]
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/abc", "commitOid": "abc"})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "base")


def exported(base: Path, place: Path, *settings: str):
    words = [f"model.path={base}", f"export.output_dir={place}", "export.check=false", *settings]
    return api.export(load_config("export", words))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_push_uploads_all_files_in_one_commit_and_what_it_replaces_is_gone(base, tmp_path, hub):
    hub.private["us/tiny"] = False
    hub.files = {"us/tiny/model-00001-of-00002.safetensors": b"an older one's", "us/tiny/notes.txt": b"the user's"}
    done = exported(base, tmp_path / "out", "export.push=us/tiny")
    expected = {f"us/tiny/{name}": data for name, data in files_of(tmp_path / "out").items()}
    assert hub.files == {**expected, "us/tiny/notes.txt": b"the user's"}
    assert hub.messages == ["base as hf, dtype auto"] and done.commit == f"{hub.url}/us/tiny/commit/abc"
    assert hub.private == {"us/tiny": False}
    assert str(base.parent) not in hub.files["us/tiny/README.md"].decode().split("---")[1]  # a hub takes names of its own alone


def test_a_failed_upload_is_repeated_by_the_command_that_the_error_says(base, tmp_path, hub):
    hub.full = True
    with pytest.raises(ResourceError, match=r"The upload to me/tiny failed .*storage is full|403") as raised:
        exported(base, tmp_path / "out", "export.push=me/tiny")
    hub.full, command = False, shlex.split(str(raised.value).partition("this uploads it: ")[2])
    assert command[0] == "hf" and not hub.files
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "0"}
    command[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(command, env={**os.environ, **ours}, check=True, capture_output=True, timeout=60)
    assert hub.files == {f"me/tiny/{name}": data for name, data in files_of(tmp_path / "out").items()}
    assert hub.messages == ["base as hf, dtype auto"] and hub.private == {"me/tiny": True}


@pytest.mark.parametrize(
    ("repo", "token", "role", "error", "said"),
    [
        ("tiny", TOKEN, "write", ConfigError, "export.push must be owner/name"),
        ("me/ti--ny", TOKEN, "write", ConfigError, "export.push must be a name that a hub takes"),
        ("you/tiny", TOKEN, "write", ConfigError, r"an organization of theirs \(me, us\)"),
        ("me/tiny", "hf_other", "write", ResourceError, "does not take the token"),
        ("me/tiny", "", "write", ResourceError, "needs a token"),
        ("me/tiny", TOKEN, "read", ResourceError, "may only read"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(
    base, tmp_path, hub, monkeypatch, repo, token, role, error, said
):
    hub.role = role
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(error, match=said):
        exported(base, tmp_path / "out", f"export.push={repo}")
    assert not any(tmp_path.iterdir()) and not hub.private


@pytest.mark.parametrize(
    ("address", "offline", "said"), [("http://127.0.0.1:9", False, "does not answer"), ("", True, "OFFLINE")]
)
def test_a_hub_that_cannot_be_reached_is_said_before_anything_is_written(base, tmp_path, monkeypatch, address, offline, said):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ResourceError, match=said):
        exported(base, tmp_path / "out", "export.push=me/tiny")
    assert not any(tmp_path.iterdir())


def test_an_upload_whose_connection_breaks_is_an_error_that_says_the_command(base, tmp_path, hub):
    hub.hangs_up = True
    with pytest.raises(ResourceError, match=r"The upload to me/mine failed .* this uploads it: hf upload"):
        exported(base, tmp_path / "out", "export.push=me/mine")
    assert (tmp_path / "out" / "export.json").is_file()


@pytest.mark.parametrize("name", ["me/nothing", "me/not--a--name"])
def test_a_model_that_the_hub_does_not_have_is_named(name, tmp_path, hub):
    with pytest.raises(ConfigError, match=rf"^model\.path must be a folder.*{name}"):
        api.export(load_config("export", [f"model.path={name}", f"export.output_dir={tmp_path / 'out'}"]))
    assert not any(tmp_path.iterdir())
