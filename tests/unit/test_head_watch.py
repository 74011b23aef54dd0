"""A command whose cluster has lost its head ends by itself, with a line that says so, before Ray aborts it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from raytune_llm import head_watch
from raytune_llm.errors import ConfigError, HeadLost, ResourceError
from raytune_llm.head_watch import ends_without_head

HEAD = "10.0.0.1:6379"


@pytest.fixture
def head(monkeypatch):
    """The head answers where `answers` says so."""
    monkeypatch.setattr(head_watch, "connected_head", lambda: HEAD)
    monkeypatch.setattr(head_watch, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(head_watch, "SAID_AFTER_S", 0.05)
    monkeypatch.setattr(head_watch, "PATIENCE_S", 0.3)

    def is_up(answers):
        monkeypatch.setattr(head_watch, "answers", answers)

    return is_up


def test_a_command_that_waits_ends_when_the_head_is_gone_and_says_before_that_it_waits(head, caplog):
    head(lambda address: False)
    with pytest.raises(HeadLost, match=rf"head does not answer at {HEAD}\. The same command answers the rest") as lost:
        with ends_without_head("answers the rest"):
            threading.Event().wait(30)
    assert lost.value.exit_code == 1
    assert caplog.messages == [f"waiting for the head of the cluster, which does not answer at {HEAD}, for up to 0.3 s"]


def test_a_head_that_comes_back_in_time_ends_nothing(head):
    began = time.monotonic()
    head(lambda address: time.monotonic() - began > 0.2)
    with ends_without_head("resumes"):
        time.sleep(0.6)


def test_where_ray_waits_longer_for_a_head_the_command_does_too(head, caplog, monkeypatch):
    head(lambda address: False)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "60.5")
    with pytest.raises(HeadLost), ends_without_head("resumes"):
        threading.Event().wait(30)
    assert caplog.messages == [f"waiting for the head of the cluster, which does not answer at {HEAD}, for up to 0.8 s"]


@pytest.mark.parametrize("answers", [True, False])
def test_what_fails_since_the_head_is_gone_says_that_and_a_mistake_stays_one(head, answers):
    head(lambda address: answers)
    with pytest.raises(ResourceError) as raised, ends_without_head("resumes"):
        raise ResourceError("a worker was lost")
    assert isinstance(raised.value, HeadLost) != answers
    with pytest.raises(ConfigError), ends_without_head("resumes"):
        raise ConfigError("x", "must be y")


def test_an_interrupt_by_the_user_stays_one(head):
    head(lambda address: False)
    with pytest.raises(KeyboardInterrupt), ends_without_head("resumes"):
        raise KeyboardInterrupt


STUCK = """
import signal, time
from raytune_llm import head_watch
head_watch.connected_head, head_watch.answers = lambda: "10.0.0.1:6379", lambda address: False
head_watch.LOOK_EVERY_S, head_watch.PATIENCE_S, head_watch.ENDS_WITHIN_S = 0.02, 0.1, 0.2
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
with head_watch.ends_without_head("resumes"):
    time.sleep(60)
"""


def test_a_call_that_no_signal_interrupts_ends_with_the_process():
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "error: Ray lost the run: its head does not answer at 10.0.0.1:6379. The same command resumes, once Ray is back."
    ]


NOISY = """
import os, time
from raytune_llm import head_watch
gone = True
head_watch.connected_head, head_watch.answers = lambda: "10.0.0.1:6379", lambda address: not gone
head_watch.LOOK_EVERY_S, head_watch.SAID_AFTER_S = 0.02, 0.05
with head_watch.ends_without_head("resumes"):
    time.sleep(0.5)
    os.write(2, b"Failed to push error\\n")
    gone = False
    time.sleep(0.5)
    os.write(2, b"heard again\\n")
"""


def test_native_code_is_not_heard_while_the_head_is_silent():
    ended = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, timeout=50)
    assert ended.stderr.splitlines() == [
        "waiting for the head of the cluster, which does not answer at 10.0.0.1:6379, for up to 25 s",
        "heard again",
    ]
