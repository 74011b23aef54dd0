"""A server on Ray Serve, two engines: what one of them loses, learns and refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.toy_engine import BROKEN_ONCE, adapter_folder
from tests.toy_server import STEP_S

pytestmark = pytest.mark.ray
MARK = "RAYTUNE_LLM_TEST_SERVER"
ENGINES = 2


@dataclass
class Server:
    process: subprocess.Popen[str]
    root: Path
    mark: str
    said: list[str] = field(default_factory=list)
    url: str = ""

    def until_ready(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()
        wait_for(lambda: self.process.poll() is not None or any("ready at" in line for line in self.said), 240)
        self.url = self.said[-1].removeprefix("ready at ")

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def complete(self, tokens: int = 4, model: str = "base", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": model, "prompt": "ab", "max_tokens": tokens, "ignore_eos": True, **body})

    def stream(self, tokens: int, model: str = "base") -> list[dict[str, Any]]:
        """Its events, without [DONE]."""
        body = {"model": model, "prompt": "ab", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def running(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["running"])

    def places(self, adapter: str, *levels: str) -> set[str]:
        """Engines that have it."""
        text = httpx.get(f"{self.url}/metrics").text
        pattern = rf'raytune_llm:adapter_resident{{adapter="{adapter}",engine="(\w+)",level="(\w+)"'
        return {engine for engine, level in re.findall(pattern, text) if not levels or level in levels}

    def engines(self) -> list[int]:
        return [pid for pid, name in self.processes().items() if "ServeReplica:raytune-llm:engine" in name]

    def processes(self) -> dict[int, str]:
        """All that descend from it, its cluster's too."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:
                continue  # it has ended meanwhile
        return found


def wait_for(condition: Callable[[], Any], seconds: float = 40) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def made(events: list[dict[str, Any]]) -> int:
    """Tokens that a stream says at its end that it had."""
    return events[-1]["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """Gives the server that is running; starts one where none is. They are ended with the module's tests."""
    servers: list[Server] = []

    def running() -> Server:
        if not servers or servers[-1].process.poll() is not None:
            servers.append(start(tmp_path_factory.mktemp("adapters")))
            servers[-1].until_ready()
        return servers[-1]

    yield running
    for server in servers:
        server.process.kill()
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def server(started: Callable[[], Server]) -> Server:
    """With nothing to do, and all its engines there: whatever the test before it did."""
    server = started()
    wait_for(lambda: server.running() == 0 and len(server.engines()) == ENGINES)
    return server


@pytest.fixture
def a1(server: Server) -> str:
    """An adapter that both engines hold."""
    if not server.places("a1"):
        folder = adapter_folder(server.root / "a1", 1)
        assert server.post("/v1/load_lora_adapter", {"lora_name": "a1", "lora_path": str(folder)}).status_code == 200
    wait_for(lambda: len(server.places("a1")) == ENGINES)
    return "a1"


def start(root: Path) -> Server:
    """Two engines of 4 rows, 50 ms a step; 4 requests may wait for each."""
    (root / "watched").mkdir()
    settings = [f"serve.replicas={ENGINES}", "serve.max_waiting=4", "engine.max_rows=4", "serve.max_adapters=2"]
    folders = [f"serve.adapter_roots=[{root}]", f"serve.watch={root}/watched"]
    mark = root.as_posix()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.toy_server", *settings, *folders],
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Server(process, root, mark)


def test_it_is_ready_when_it_says_so(server: Server) -> None:
    assert server.complete().json()["usage"]["completion_tokens"] == 4
    assert made(server.stream(5)) == 5


def test_errors_are_the_apis(server: Server) -> None:
    unknown = server.complete(model="nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    refused = server.post(
        "/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(adapter_folder(server.root / "bad", -1))}
    )
    assert refused.status_code == 400 and "doesn't fit" in refused.json()["error"]["message"]
    assert server.complete(model="bad").status_code == 404


def test_an_adapter_is_loaded_by_all_and_asked_where_it_is(server: Server, a1: str) -> None:
    texts = {server.complete(model=a1, temperature=0).json()["choices"][0]["text"] for _ in range(6)}
    assert len(texts) == 1 and texts != {server.complete(temperature=0).json()["choices"][0]["text"]}
    folder = adapter_folder(server.root / "alone", 3)
    assert server.post("/v1/load_lora_adapter", {"lora_name": "alone", "lora_path": str(folder)}).status_code == 200
    for _ in range(6):
        assert server.complete(model="alone").status_code == 200
    wait_for(lambda: server.places("alone", "device"))
    time.sleep(2)  # reports are up to a second old
    assert len(server.places("alone", "device")) == 1  # though both engines have free slots and free rows


def test_an_adapter_is_unloaded_by_all(server: Server) -> None:
    folder = adapter_folder(server.root / "gone", 4)
    assert server.post("/v1/load_lora_adapter", {"lora_name": "gone", "lora_path": str(folder)}).status_code == 200
    assert server.complete(model="gone").status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "gone"}).status_code == 200
    assert {server.complete(model="gone").status_code for _ in range(4)} == {404}
    assert not server.places("gone")


def listed(server: Server, name: str) -> dict[str, Any]:
    (found,) = (one for one in httpx.get(f"{server.url}/admin/adapters").json()["adapters"] if one["name"] == name)
    return found


def test_a_change_that_one_engine_falls_over_is_made_by_none(server: Server) -> None:
    folder = adapter_folder(server.root / "once", BROKEN_ONCE)
    answered = server.post("/v1/load_lora_adapter", {"lora_name": "once", "lora_path": str(folder)})
    assert answered.status_code == 503 and "FileExistsError" in answered.json()["error"]["message"]
    assert not server.places("once") and server.complete(model="once").status_code == 404


def test_a_pin_is_kept_by_a_new_version_and_the_last_slot_is_not_pinned(server: Server) -> None:
    for name in ("kept", "more"):
        body = {"lora_name": name, "lora_path": str(adapter_folder(server.root / name, 7))}
        assert server.post("/v1/load_lora_adapter", body).status_code == 200
    assert server.post("/admin/adapters/kept/pin", {"pinned": True}).status_code == 200
    refused = server.post("/admin/adapters/more/pin", {"pinned": True})  # each engine has two slots
    assert refused.status_code == 400 and "serve.max_adapters" in refused.json()["error"]["message"]
    body = {"lora_name": "kept", "lora_path": str(adapter_folder(server.root / "kept", 8)), "load_inplace": True}
    before = listed(server, "kept")["version"]
    assert server.post("/v1/load_lora_adapter", body).json()["version"] != before
    assert listed(server, "kept")["pinned"] and not listed(server, "more")["pinned"]
    for name in ("kept", "more"):
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200


def test_an_engine_that_stalls_keeps_no_request_from_the_other(server: Server, a1: str) -> None:
    assert server.complete(model=a1).status_code == 200
    answered = []
    for engine in server.engines():
        time.sleep(1.1)  # what the ingress knows of the engines is a second old
        os.kill(engine, signal.SIGSTOP)
        try:
            body = {"model": a1, "prompt": "ab", "max_tokens": 1}
            answered += [httpx.post(f"{server.url}/v1/completions", json=body, timeout=3).status_code]
        except httpx.TimeoutException:
            pass  # it is the engine that has the adapter in a slot
        finally:
            os.kill(engine, signal.SIGCONT)
    assert answered == [200]


def test_what_a_run_writes_is_served(server: Server) -> None:
    run = server.root / "watched" / "fresh"
    run.mkdir()
    adapter_folder(run / "writing", 5).rename(run / "final")
    wait_for(lambda: server.complete(model="fresh").status_code == 200)
    wait_for(lambda: len(server.places("fresh")) == ENGINES)


def test_too_many_requests_are_refused_at_once(server: Server) -> None:
    def ask() -> tuple[httpx.Response, float]:
        began = time.monotonic()
        return server.complete(60), time.monotonic() - began

    with ThreadPoolExecutor(30) as threads:
        answers = list(threads.map(lambda _: ask(), range(30)))
    refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 429]
    assert 30 - ENGINES * (4 + 4) <= len(refused) <= 30 - ENGINES * 4  # 4 rows an engine, and 4 that wait
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer, _ in refused)
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer, _ in refused)
    # None waited for a row: the first answers end after 60 steps. How fast it is says scripts/bench serve_overhead.
    assert statistics.median(seconds for _, seconds in refused) < 60 * STEP_S / 2
    assert {answer.status_code for answer, _ in answers} == {200, 429}


def test_a_client_that_goes_frees_its_row(server: Server) -> None:
    body = {"model": "base", "prompt": "ab", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # one that is thrown away closes the connection
        assert "choices" in next(lines)
        wait_for(lambda: server.running() == 1)
    wait_for(lambda: server.running() == 0, 500 * STEP_S / 2)  # before all its tokens are there


def test_a_killed_engine_ends_its_streams_with_an_error_and_the_others_go_on(server: Server, a1: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        streams = [threads.submit(server.stream, 60) for _ in range(6)]
        wait_for(lambda: server.running() == 6)
        before = set(server.engines())
        os.kill(min(before), signal.SIGKILL)
        ends = [stream.result()[-1] for stream in streams]
    broken = [end["error"] for end in ends if "error" in end]
    assert 0 < len(broken) < 6
    assert all(error["code"] == "engine_unavailable" for error in broken)
    assert all(end["usage"]["completion_tokens"] == 60 for end in ends if "error" not in end)
    assert server.complete().status_code == 200
    # The one that takes its place learns what was loaded before it was there.
    wait_for(lambda: len(server.places(a1)) == ENGINES and len(set(server.engines()) - before) == 1)
    assert server.complete(model=a1).status_code == 200


def test_a_second_server_on_the_cluster_is_refused_and_the_first_stays(server: Server) -> None:
    (address,) = {found[1] for name in server.processes().values() if (found := re.search(r"--gcs-address=(\S+)", name))}
    settings = ["model=tiny_random", "resources=cluster", f"resources.address={address}", "serve.port=8123"]
    command = [sys.executable, "-m", "raytune_llm", "serve", *settings]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "a server is already running on this cluster" in second.stderr
    assert server.complete().status_code == 200


def test_streams_survive_an_update(server: Server, a1: str) -> None:
    for name in ("again", "ended"):  # served by serve.watch, and then unloaded
        (server.root / "watched" / name).mkdir()
        adapter_folder(server.root / "watched" / name / "writing", 5).rename(server.root / "watched" / name / "final")
        wait_for(lambda name=name: len(server.places(name)) == ENGINES)
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200
    adapter_folder(server.root / "watched" / "again" / "final", 6)  # a new version of one of them
    wait_for(lambda: len(server.places("again")) == ENGINES)
    before = set(server.engines())
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(server.stream, 200) for _ in range(4)]
        wait_for(lambda: server.running() == 4)
        assert server.process.stdin is not None
        server.process.stdin.write("update\n")
        server.process.stdin.flush()
        wait_for(lambda: not before & set(server.engines()), 90)
        wait_for(lambda: len(server.engines()) == ENGINES)
        assert all(made(stream.result()) == 200 for stream in streams)
    assert server.complete(model=a1).status_code == 200
    wait_for(lambda: len(server.places("again")) == ENGINES and not server.places("ended"))  # as before


def test_it_drains_and_leaves_nothing_behind(server: Server) -> None:
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(server.stream, 60)
        wait_for(lambda: server.running() == 1)
        server.process.send_signal(signal.SIGTERM)
        assert made(stream.result()) == 60
    assert server.process.wait(30) == 128 + signal.SIGTERM
    assert server.said[-2:] == ["draining", "stopped"]
    wait_for(lambda: not server.processes())
