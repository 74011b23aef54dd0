"""What Ray raises when it does not start, or when it loses a run, is told plainly."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RaySystemError
from ray.train import ControllerError, WorkerGroupError

from raytune_llm import session
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.runs.ray_failures import cause, how_it_ended


def resources(name: str, *more: str):
    return load_config("train", [f"resources={name}", "data.path=x", *more]).resources


@pytest.mark.parametrize(
    "error", [RuntimeError(""), TimeoutError("30 s\nmore"), RaySystemError("x"), ValueError("/tmp"), OSError(28, "No space left")]
)
def test_a_start_that_fails_names_the_machine_and_the_way_out(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fails(**settings: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test of this process may have started one
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(ResourceError, match=r"Ray did not start on this machine .*resources=inline"):
        session.connect(resources("local"))
    with pytest.raises((ResourceError, ConfigError), match=r"no Ray cluster answers at|resources\.address must be an address"):
        session.connect(resources("cluster", "resources.address=auto"))


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_listens_and_is_no_head_of_ray_is_named_within_seconds(answer: bytes | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session, "ANSWERS_WITHIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listens:

        def take() -> None:
            taken.append(listens.accept()[0])
            if answer is not None:
                taken[0].recv(100)
                taken[0].sendall(answer)
                taken[0].close()

        taken: list[socket.socket] = []
        threading.Thread(target=take, daemon=True).start()
        address = f"127.0.0.1:{listens.getsockname()[1]}"
        with pytest.raises(
            ResourceError, match=rf"no Ray cluster answers at {address} \((timed out|what listens there is no head)"
        ):
            session.connect(resources("cluster", f"resources.address={address}"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ControllerError(RuntimeError("")), "the workers did not start: RuntimeError"),
        (ControllerError(TimeoutError("no place in 300 s\nmore")), "the workers did not start: no place in 300 s"),
        (WorkerGroupError("", {0: OutOfMemoryError("killed")}), "a worker ran out of memory"),
        (WorkerGroupError("", {1: ConfigError("train.x", "must be y")}), "train.x must be y"),
        (ActorDiedError(), "Ray lost the run"),
    ],
)
def test_the_end_of_a_group_is_told_by_its_cause(error: Exception, said: str):
    told = cause(error, last_loss="")
    assert isinstance(told, ResourceError | ConfigError) and said in str(told)


def test_a_fault_of_ours_keeps_its_traceback():
    error = WorkerGroupError("AssertionError", {0: AssertionError("OutOfMemory")})
    assert cause(error, last_loss="") is error


def test_a_connection_that_closed_is_told_in_one_clause():
    gloo = "[/third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4535. This may indicate\na"
    assert how_it_ended(RuntimeError(gloo)) == "lost the others (Connection closed by peer [10.0.0.2]:4535)"
