"""The verb as it is typed: a process, its first line and its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from raytune_llm import api
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def trained(chat_rows, cache, tmp_path_factory) -> Path:
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("runs") / "mine", "train.max_steps=1")
    return api.train(run).final


@pytest.fixture(params=["native", "hf"])
def verb(request: pytest.FixtureRequest, trained: Path) -> Iterator[subprocess.Popen[str]]:
    words = ["model=tiny_random", "serve.port=0", f"serve.adapters={{mine: {trained}}}", f"engine={request.param}"]
    words += [f"serve.watch={trained.parents[1]}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "raytune_llm", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.kill()
    process.wait()


ENDS = {"native": (signal.SIGTERM, 143, "terminated"), "hf": (signal.SIGINT, 130, "interrupted")}


@pytest.mark.long
def test_adapters_are_served_from_their_folders_until_it_is_interrupted(verb):
    said = []
    for line in verb.stdout:
        said.append(line)
        if line.startswith("ready at "):
            break
    assert ("engine=hf" in said[0]) == ("engine=hf" in verb.args)
    url = said[-1].removeprefix("ready at ").strip()
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert {"base", "mine"} <= {model.id for model in client.models.list()}
    answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert answer.model == "mine" and answer.usage.completion_tokens <= 4
    number, code, what = ENDS["hf" if "engine=hf" in verb.args else "native"]
    verb.send_signal(number)
    assert verb.wait(timeout=60) == code
    assert verb.stdout.read().endswith(f"ms\nstopped\n\n{what}\n")  # after a line a request


@pytest.mark.long
def test_a_trained_adapter_is_talked_with_by_its_folder(trained: Path):
    words = ["model=tiny_random", f"chat.adapter={trained}", "chat.max_tokens=4", "chat.temperature=0"]
    done = subprocess.run(
        [sys.executable, "-m", "raytune_llm", "chat", *words], input="hello", capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n")
