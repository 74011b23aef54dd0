"""Runs as jobs of a real Ray head: sent, followed, found again, stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raytune_llm.__main__ import main
from raytune_llm.cluster.jobs import Jobs, come_back
from tests.ray.head import ray_head

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head() as address:
        yield address


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


def words(address: str, place: Path, *overrides: str) -> list[str]:
    return [
        "submit", "+experiment=sft_full_tiny", f"submit.address={address}", f"submit.folder={ROOT}", f"output_dir={place}/shared",
        f"data.cache={place}/tokens", f"submit.results={place}/results", "resources.num_workers=1", "tracking=none", *overrides,
    ]  # fmt: skip


def command(*argv: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "raytune_llm", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def job_in(text: str) -> str:
    found = re.search(r"job (\S+) was submitted", text)
    assert found, text
    return found[1]


def test_a_run_is_followed_to_its_end_and_its_results_come_here(head, place, capsys):
    assert main(words(head, place)) == 0
    said = capsys.readouterr().out
    assert "step 15/15" in said and "trained" in said and "entrypoint" not in said
    job, there = job_in(said), place / "shared"
    assert "Next: python -m raytune_llm" in said and f"The run is in {there}." in said
    here = place / "results" / job
    assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert json.loads((here / "summary.json").read_text())["steps"] == 15
    assert (here / "loss.png").exists()

    assert main(["jobs", f"submit.address={head}"]) == 0
    listed = next(line for line in capsys.readouterr().out.splitlines() if job in line)
    assert re.search(r"sft_full_tiny .* succeeded +15/15 +\d\.\d{4} ", listed)
    assert main(["jobs", "status", "sft_full_tiny", f"submit.address={head}"]) == 0
    assert str(there) in capsys.readouterr().out
    assert main(["jobs", "fetch", job, f"submit.address={head}", f"submit.results={place}/again"]) == 0
    assert (place / "again" / job / "summary.json").read_bytes() == (here / "summary.json").read_bytes()


def test_a_sweep_is_followed_to_its_end_and_its_tables_come_here(head, place, capsys):
    verb, *others = words(head, place, "optimizer.lr=1e-3,1e-2", "tune=grid", "train.max_steps=2", f"output_dir={place}/sweep")
    assert main([verb, "tune", *others]) == 0
    said = capsys.readouterr().out
    assert "trial 1 finished" in said and '"event"' not in said
    here, there = place / "results" / job_in(said), place / "sweep"
    for name in ("trials.csv", "results.json", "best.yaml"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert f"The run is in {there}." in said and f"fetched to {here}: trials.csv, results.json, best.yaml" in said


def test_the_driver_s_own_exit_code_is_ours(head, place, capsys):
    assert main(words(head, place, "name=mistaken", "data.path=/no/such/rows.jsonl")) == 2
    said = capsys.readouterr().out
    assert "error: " in said and "/no/such/rows.jsonl" in said and "its driver ended with exit code 2" in said


def test_an_interrupt_leaves_the_job_which_is_stopped_by_its_run_s_name(head, place, capsys):
    follower = command(*words(head, place, "name=left", f"output_dir={place}/left", "train.epochs=2000"))
    assert follower.stdout is not None
    for line in follower.stdout:
        if "was submitted" in line:
            break
    time.sleep(1)
    follower.send_signal(signal.SIGINT)
    said = line + follower.stdout.read()
    assert follower.wait(timeout=30) == 130
    assert f"jobs logs {job_in(said)} submit.address={head}" in said and "Traceback" not in said
    assert not Jobs(head).find("left").has_ended
    assert main(["jobs", "stop", "left", f"submit.address={head}"]) == 0
    assert Jobs(head).find("left").status == "STOPPED"
    assert main(["jobs", "stop", "left", f"submit.address={head}"]) == 0
    assert "had ended" in capsys.readouterr().out


def test_an_interrupt_while_a_job_is_sent_says_how_to_find_it(head, monkeypatch):
    jobs = Jobs(head)
    send = jobs._client.submit_job

    def interrupted(**settings: Any) -> None:
        send(**settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs._client, "submit_job", interrupted)
    with pytest.raises(KeyboardInterrupt) as found:
        jobs.submit("-日本", "true", files={}, output_dir="/none")
    [job] = [job for job in Jobs(head).all() if job.run == "-日本"]
    assert job.id.startswith("run-"), "no flag of a command line"
    assert found.value.__notes__ == [f"{job.id} may have been submitted by then. {come_back(job.id, head)}"]


def test_a_detached_submit_returns_at_once(head, place, capsys):
    assert main(words(head, place, "name=detached", "data.path=/no/such/rows.jsonl", "submit.detach=true")) == 0
    said = capsys.readouterr().out
    assert f"jobs logs {job_in(said)}" in said
    assert main(["jobs", "logs", "detached", f"submit.address={head}", f"submit.results={place}/none"]) == 2


def test_a_job_that_there_is_not_is_named_with_those_that_there_are(head, capsys):
    assert main(["jobs", "logs", "no_such", f"submit.address={head}"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_jobs_are_listed_where_the_log_of_one_is_on_a_node_that_is_gone(head, monkeypatch, capsys):
    job = Jobs(head).submit("logless", "true", files={}, output_dir="/none")
    log = Jobs.log

    def away(self: Jobs, name: str) -> str:
        with self._explained():
            if name == job:  # what a head answers whose node of that job does not
                raise RuntimeError(
                    "Request failed with status code 500: Traceback (most recent call last):\n  ...\nOSError: no route\n."
                )
        return log(self, name)

    monkeypatch.setattr(Jobs, "log", away)
    assert main(["jobs", f"submit.address={head}"]) == 0
    said = capsys.readouterr().out
    assert f"warning: the log of {job} can't be read ({head} refused: OSError: no route)" in said
    assert any(line.startswith("logless") for line in said.splitlines())
    assert main(["jobs", "status", "logless", f"submit.address={head}"]) == 0


class Broken:
    """A way to a port whose connections break off, once, after so many bytes from there since it was told to."""

    def __init__(self, port: int) -> None:
        self._port, self._left, self.breaks = port, None, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def break_after(self, num_bytes: int) -> None:
        self._left: int | None = num_bytes

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, sink, source is server), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1024):
                sink.sendall(data)
                if counted and self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left, self.breaks = None, self.breaks + 1
                        break
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # a close would not wake who reads

    def close(self) -> None:
        self._listener.close()


def test_a_broken_connection_is_taken_up_again_without_a_line_lost_or_twice(head):
    way = Broken(int(head.rpartition(":")[2]))
    numbers = "for i in $(seq 300); do echo line $i; [ $((i % 100)) -eq 0 ] && sleep 2; done; printf the_end; exit 7"
    jobs, told = Jobs(way.address), []
    job = jobs.submit("numbers", numbers, files={}, output_dir="/none")
    way.break_after(1_500)
    lines = list(jobs.lines(job, told.append))
    way.close()
    assert lines == [*(f"line {number}" for number in range(1, 301)), "the_end"]
    assert way.breaks == 1
    assert Jobs(head).get(job).outcome == 7


def test_where_no_dashboard_answers_nothing_is_sent(place, capsys):
    began = time.monotonic()
    with socket.socket() as silent:  # it has the port, and does not listen
        silent.bind(("127.0.0.1", 0))
        assert main(words(f"http://127.0.0.1:{silent.getsockname()[1]}", place)) == 2
    assert "no Ray dashboard answers at" in capsys.readouterr().err and time.monotonic() - began < 20


@pytest.mark.long
def test_a_head_with_a_token_takes_jobs_of_those_who_have_it(tmp_path):
    token = "t" * 32
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as address:
        argv = ("jobs", f"submit.address={address}")
        stranger = command(*argv, HOME=str(tmp_path))
        said, _ = stranger.communicate()
        assert stranger.returncode == 2 and "wants a token, and this machine has none" in said
        mistaken = command(*argv, HOME=str(tmp_path), RAY_AUTH_TOKEN=token[:-1] + "u")
        said, _ = mistaken.communicate()
        assert mistaken.returncode == 2 and "rejects this machine's token" in said
        friend = command(*argv, HOME=str(tmp_path), RAY_AUTH_TOKEN=token)
        said, _ = friend.communicate()
        assert friend.returncode == 0 and "has no jobs" in said, said
        after_a_run_here = command(*argv, HOME=str(tmp_path), RAY_AUTH_TOKEN=token, RAY_AUTH_MODE="disabled")
        said, _ = after_a_run_here.communicate()
        assert after_a_run_here.returncode == 0 and "has no jobs" in said, said
