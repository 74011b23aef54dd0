"""The verb at a terminal and in a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx

from tests.unit.serve.conftest import KEY, Server

DONE = ", the first after"


def answer_of(server: Server, model: str, *messages: dict) -> str:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6}
    told = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}).json()
    return told["choices"][0]["message"]["content"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def saved(chat, path) -> list[dict]:
    chat.says(f"/save {path}", "> ")
    for _ in range(100):
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return json.loads(text)["messages"]
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


def test_an_answer_streams_with_its_speed_and_is_part_of_the_conversation(chat, server, tmp_path):
    typist = chat()
    typist.says("hello", DONE, "6 tokens", "cut at max_tokens", "> ")
    typist.says("again", DONE, "> ")
    first = answer_of(server, "base", user("hello"))
    messages = saved(typist, tmp_path / "talk.json")
    assert messages[:3] == [user("hello"), {"role": "assistant", "content": first}, user("again")]
    second = answer_of(server, "base", *messages[:3])
    assert messages[3:] == [{"role": "assistant", "content": second}]


def test_adapters_are_listed_and_taken_and_answer(chat, server, tmp_path):
    typist = chat("chat.adapter=a1")
    typist.says("hello", DONE, "a1> ")
    typist.says("/adapter", "base (base)", "* a1", "a2", "a1> ")
    typist.says("/adapter nothing", "must be none or one of a1, a2", "a1> ")
    typist.says("/adapter a2", "a2> ")
    typist.says("/retry", DONE, "a2> ")
    assert saved(typist, tmp_path / "talk.json")[-1]["content"] == answer_of(server, "a2", user("hello"))
    typist.says("/adapter none", "\n> ")
    typist.says("/retry", DONE, "> ")
    assert saved(typist, tmp_path / "base.json")[-1]["content"] == answer_of(server, "base", user("hello"))


def test_base_and_adapters_are_compared_and_the_conversation_stays(chat, server, tmp_path):
    typist = chat()
    typist.says("/compare", "needs a question", "> ")
    seen = typist.says("/compare hello", "base", "a1", "a2", "tokens/s", "> ")
    assert "needs" not in seen
    assert saved(typist, tmp_path / "talk.json") == []


def test_system_settings_undo_and_load(chat, tmp_path):
    typist = chat()
    typist.says("/system Be brief.", "> ")
    typist.says("/set max_tokens 3", "> ")
    typist.says("hello", "3 tokens", "> ")
    typist.says("/set", "max_tokens=3", "temperature=0", "> ")
    typist.says("/set max_tokens no", "must be a whole number", "> ")
    typist.says("/set colour red", "must be one of temperature", "> ")
    path = tmp_path / "talk.json"
    before = saved(typist, path)
    assert [message["role"] for message in before] == ["system", "user", "assistant"]
    typist.says("/undo", "> ")
    assert [message["role"] for message in saved(typist, tmp_path / "undone.json")] == ["system"]
    typist.says("/undo", "nothing to undo", "> ")
    typist.says(f"/load {path}", "user: hello", "> ")
    assert saved(typist, tmp_path / "loaded.json") == before


def test_what_the_server_refuses_is_told_and_was_not_asked(chat, tmp_path):
    typist = chat()
    typist.says("/set temperature 9", "> ")
    typist.says("hello", "the server answers 400", "temperature", "> ")
    assert saved(typist, tmp_path / "talk.json") == []
    typist.says("/set temperature none", "> ")
    typist.says("hello", DONE, "> ")


def test_the_exact_prompt_and_its_length_are_shown(chat):
    typist = chat()
    typist.says("/prompt", "is empty", "> ")
    typist.says("/system Be brief.", "> ")
    typist.says("hello", DONE, "> ")
    seen = typist.says("/prompt", "<|im_start|>assistant", "> ").replace("\r", "")
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert expected in seen
    typist.says("/tokens", "of 600 tokens", "> ")


def test_pasted_lines_are_one_message(chat, tmp_path):
    typist = chat()
    typist.types("\x1b[200~one\ntwo\n\nthree\x1b[201~\r")  # as terminals mark what is pasted
    typist.sees(DONE, "> ")
    typist.types("four\nfive\n")  # a terminal that doesn't
    typist.sees(DONE, "> ")
    typist.types('"""\r')
    typist.sees(". ")
    typist.says("six", ". ")
    typist.says("", ". ")
    typist.says("seven", ". ")
    typist.says('"""', DONE, "> ")
    questions = [message["content"] for message in saved(typist, tmp_path / "talk.json") if message["role"] == "user"]
    assert questions == ["one\ntwo\n\nthree", "four\nfive", "six\n\nseven"]


def test_ctrl_c_stops_the_answer_and_frees_its_row(chat, server, tmp_path):
    typist = chat("chat.max_tokens=400")
    server.runner.delay_s = 0.05
    try:
        typist.types("hello\r")
        until = time.monotonic() + 20
        before = len(server.runner.steps)
        while len(server.runner.steps) < before + 10:  # so that some of the answer is there
            assert time.monotonic() < until
            time.sleep(0.01)
        typist.types("\x03")
        typist.sees("stopped", "> ")
        until = time.monotonic() + 10  # all its tokens take twice as long
        while server.engine.stats().running:
            assert time.monotonic() < until, "its row is still there"
    finally:
        server.runner.delay_s = 0.0
    messages = saved(typist, tmp_path / "talk.json")
    assert [message["role"] for message in messages] == ["user", "assistant"] and messages[-1]["content"]
    typist.interrupts("Ctrl-D or /exit ends the chat", "> ")
    typist.types("\x04")
    assert typist.process.wait(timeout=20) == 0


def test_unknown_commands_are_named_and_a_beginning_is_enough(chat):
    typist = chat()
    typist.says("/nothing", "must be one of /adapter", "> ")
    typist.says("/tok", "is empty", "> ")
    typist.says("/help", "/compare", "Ctrl-C", "> ")
    typist.types("/exit\r")
    assert typist.process.wait(timeout=20) == 0


def piped(said: str, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raytune_llm", "chat", *settings]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=120)


def test_a_pipe_gives_the_answer_and_nothing_else(server):
    done = piped("hello\nthere\n", f"chat.url={server.url}/v1", f"chat.api_key={KEY}", "chat.max_tokens=6", "chat.temperature=0")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == answer_of(server, "base", user("hello\nthere")) + "\n"


def test_a_pipe_gives_the_answer_of_a_model_of_this_process():
    done = piped("hello\n", "model=tiny_random", "chat.max_tokens=3", "chat.temperature=0")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("\n")


def test_mistakes_end_with_code_2_and_no_traceback(server):
    for said, setting, named in (
        ("", f"chat.url={server.url}", "standard input"),
        ("hi", "chat.url=localhost", "must begin with http"),
        ("hi", "chat.url=http://127.0.0.1:9", "does not answer"),
        ("hi", f"chat.url={server.url}", "401"),
        ("hi", "chat.adapter=no/folder", "chat.adapter must be a folder"),
        ("hi", "model.path=no/model/here", "model.path"),
    ):
        done = piped(said, setting)
        assert done.returncode == 2 and done.stdout == "", done
        assert named in done.stderr and "Traceback" not in done.stderr, done.stderr
