"""Conversations with a model that says what the test lets it say: thoughts, calls of tools, files."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
import uvicorn
from rich.console import Console

from raytune_llm import load_config
from raytune_llm.chat.client import Answer, Client, Model
from raytune_llm.chat.dialogue import Dialogue
from raytune_llm.chat.open import adapter_name
from raytune_llm.chat.slash import run_command
from raytune_llm.chat.terminal import Terminal
from raytune_llm.commands import chat as chat_command
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.errors import ConfigError, DataError, ResourceError
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.api.server import Access
from raytune_llm.serve.backend import InProcessBackend, ModelFacts
from raytune_llm.serve.prompts import Prompts
from tests.toy_engine import ToyRunner, adapter_folder
from tests.unit.serve.conftest import KEY

TEMPLATE = """{% for tool in tools or [] %}tool {{ tool.function.name }}
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class ScriptedRunner(ToyRunner):
    """Says `script`, whatever is asked."""

    script = b""

    def run(self, pieces) -> torch.Tensor:
        logits_RV = torch.zeros(0, self.vocab_size)
        for row, _, stop in pieces:
            if stop == len(row.ids):
                values_V = torch.zeros(self.vocab_size)
                said = stop - row.prompt_tokens
                values_V[self.script[said] if said < len(self.script) else 257] = 1.0
                logits_RV = torch.cat([logits_RV, values_V[None]])
        return logits_RV


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[ScriptedRunner, Client]]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    runner: Any = ScriptedRunner(num_blocks=512, block_size=4, vocab_size=len(tokenizer))
    engine = NativeEngine(runner, tokenizer, end_ids=[257], max_length=1000, max_rows=4, step_tokens=64)
    backend = InProcessBackend(engine, ModelFacts(name="base", max_length=1000, hidden_size=4, scores=False), max_waiting=32)
    access = Access(api_key=None, admin_key=None, roots=[], max_body_bytes=100_000)
    http = uvicorn.Server(uvicorn.Config(build_app(backend, Prompts(tokenizer), access), port=0, log_level="warning"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    client = Client.at(f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}", None)
    yield runner, client
    client.close()
    http.should_exit = True
    thread.join()
    engine.close()


@pytest.fixture
def dialogue(scripted) -> Dialogue:
    return Dialogue(scripted[1], scripted[1].models(), "base", settings={"temperature": 0})


def answered(dialogue: Dialogue) -> tuple[Answer, list[tuple[str, str]]]:
    answer = Answer()
    return answer, [(kind, text) for kind, text in dialogue.ask(answer)]


def test_thoughts_are_told_apart_from_the_answer(scripted, dialogue):
    scripted[0].script = "<think>\nA fox? Käse!\n</think>\n\nYes.".encode()
    dialogue.say("Is it?")
    answer, pieces = answered(dialogue)
    assert (answer.reasoning, answer.text, answer.finish) == ("A fox? Käse!", "Yes.", "stop")
    assert "".join(text for kind, text in pieces if kind == "reasoning") == "A fox? Käse!"
    assert answer.tokens == len(scripted[0].script) and (answer.tokens_per_s or 0) > 0 and (answer.first_s or 0) > 0
    assert dialogue.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "A fox? Käse!"}


def test_thinking_goes_to_the_template(dialogue):
    dialogue.say("Is it?")
    assert not dialogue.prompt().text.endswith("</think>\n\n")
    dialogue.thinking = False
    assert dialogue.prompt().text.endswith("<think>\n\n</think>\n\n")


def test_a_called_tool_waits_for_its_result_which_the_model_is_told(scripted, dialogue, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    dialogue.load_tools(tmp_path / "tools.json")
    scripted[0].script = b'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    dialogue.say("How is it in Bern?")
    answer, _ = answered(dialogue)
    assert answer.text == "Let me see." and answer.finish == "tool_calls"
    call = dialogue.open_call
    assert call is not None and call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    dialogue.say("sunny")
    assert dialogue.open_call is None and dialogue.messages[-1] == {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": "sunny",
    }
    scripted[0].script = b"It is sunny."
    answer, _ = answered(dialogue)
    assert answer.text == "It is sunny."
    text = dialogue.prompt().text
    assert text.startswith("tool weather\n") and '"city": "Bern"' in text and "<|im_start|>tool\nsunny" in text


def test_a_saved_conversation_is_loaded_as_it_was(scripted, dialogue, tmp_path):
    scripted[0].script = b"Yes."
    dialogue.system, dialogue.tools = "Be brief.", [{"type": "function", "function": WEATHER}]
    dialogue.say("Is it?")
    answered(dialogue)
    dialogue.save(tmp_path / "talk.jsonl")
    other = Dialogue(dialogue.client, dialogue.models, "base")
    other.load(tmp_path / "talk.jsonl")
    assert (other.system, other.messages, other.tools) == (dialogue.system, dialogue.messages, dialogue.tools)


MESSAGE = '{"messages": [{"role": "assistant", "content": "a", %s}]}'


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"messages": [1]}', '{"rows": []}', '{"messages": [{"role": 1}]}', MESSAGE % '"tool_calls": 5',
        MESSAGE % '"content": 5', MESSAGE % '"tool_calls": [{"id": "a"}]', '{"messages": [{"role": "system", "content": ["a"]}]}',
        '{"messages": [], "tools": {"a": 1}}', '{"messages": [], "tools": [{"function": "light"}]}',
    ],
)  # fmt: skip
def test_a_file_without_a_conversation_is_refused_by_its_name(dialogue, tmp_path, text):
    (tmp_path / "talk.json").write_text(text)
    dialogue.say("before")
    with pytest.raises(DataError, match=r"talk\.json"):
        dialogue.load(tmp_path / "talk.json")
    assert dialogue.messages == [{"role": "user", "content": "before"}]
    if text != "[]":  # no tools
        with pytest.raises(DataError, match=r"talk\.json"):
            dialogue.load_tools(tmp_path / "talk.json")
    with pytest.raises(DataError, match=r"missing\.json"):
        dialogue.load_tools(tmp_path / "missing.json")


def test_an_answer_can_be_had_anew_and_a_question_taken_back(scripted, dialogue):
    scripted[0].script = b"Yes."
    for question in ("One?", "Two?"):
        dialogue.say(question)
        answered(dialogue)
    assert dialogue.remove_answer() and dialogue.messages[-1]["content"] == "Two?"
    assert dialogue.undo() and [message["content"] for message in dialogue.messages] == ["One?", "Yes."]
    assert dialogue.undo() and not dialogue.undo() and not dialogue.remove_answer()


def test_settings_have_the_types_that_the_api_takes(dialogue):
    dialogue.set("top_k", "5")
    dialogue.set("stop", "END")
    assert dialogue.settings == {"temperature": 0, "top_k": 5, "stop": "END"}
    dialogue.set("top_k", "none")
    assert "top_k" not in dialogue.settings
    with pytest.raises(ConfigError, match="top_k must be a whole number, got 'x'"):
        dialogue.set("top_k", "x")
    for value in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(ConfigError, match="temperature must be a number"):
            dialogue.set("temperature", value)
    assert dialogue.settings == {"temperature": 0, "stop": "END"}


def test_messages_that_other_programs_saved_are_loaded_with_all_their_system_messages(scripted, dialogue, tmp_path):
    said = {"role": "assistant", "content": "Yes.", "tool_calls": None}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "light", "arguments": "{}"}}]}
    messages = [{"role": role, "content": role} for role in ("system", "user", "system")]
    (tmp_path / "talk.json").write_text(json.dumps({"messages": [*messages, said, called]}))
    dialogue.load(tmp_path / "talk.json")
    assert dialogue.system == "system" and [one["role"] for one in dialogue.all_messages[:3]] == ["system", "user", "system"]
    assert dialogue.open_call is None  # it has no id, by which a result could name it


def test_characters_that_may_end_lines_come_as_they_are(scripted, dialogue):
    text = "one\u2028two\u2029three\x85four\x0cfive"
    scripted[0].script = text.encode()
    dialogue.say("Lines?")
    assert answered(dialogue)[0].text == text
    body = {**dialogue.request("base"), "stream": True}
    assert scripted[1]._http.post("/v1/chat/completions", json=body).content.isascii()


def test_an_answer_is_as_long_as_what_is_left_of_the_context(scripted, dialogue):
    scripted[0].script = b"Yes."
    dialogue.settings["max_tokens"] = 5000
    dialogue.say("Is it?")
    assert answered(dialogue)[0].text == "Yes."
    dialogue.say("x" * 2000)
    with pytest.raises(ResourceError, match="maximum context length is 1000 tokens"):
        answered(dialogue)


def test_an_answer_that_can_not_be_had_anew_stays(scripted, dialogue):
    scripted[0].script = b"Yes."
    dialogue.say("Is it?")
    answered(dialogue)
    before = list(dialogue.messages)
    dialogue.settings["temperature"] = 9
    with pytest.raises(ResourceError, match="400"):
        run_command(Terminal(dialogue, Console(file=io.StringIO())), "/retry")
    assert dialogue.messages == before


def test_adapters_that_came_meanwhile_are_listed_and_taken(server, tmp_path):
    client = Client.at(server.url, KEY)
    dialogue = Dialogue(client, client.models(), "base")
    server.engine.add_adapter("late", adapter_folder(tmp_path / "late", 1))
    try:
        run_command(Terminal(dialogue, Console(file=io.StringIO())), "/adapter late")
        assert dialogue.model == "late"
    finally:
        server.engine.remove_adapter("late")
        client.close()


@contextmanager
def other_server(status: int, content: bytes) -> Iterator[Client]:
    """A client of a server that answers so, whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        client = Client.at(f"http://127.0.0.1:{http.server_port}", None)
        yield client
        client.close()
        http.shutdown()


@pytest.mark.parametrize("answer", ["<html>", '{"models": []}', "[]", '{"data": [1]}', '{"data": [{}]}', "5"])
def test_a_server_that_is_none_of_this_api_is_named(answer):
    with other_server(200, answer.encode()) as client, pytest.raises(ResourceError, match="does not answer as OpenAI's API does"):
        client.models()


@pytest.mark.parametrize("event", ["<html>", "[1]", '{"choices": [5]}', '{"choices": [{"delta": 5}]}', '{"error": "no"}'])
def test_a_stream_that_is_none_of_this_api_is_an_error(event):
    with other_server(200, f"data: {event}\n\n".encode()) as client, pytest.raises(ResourceError):
        list(client.stream(Answer(), {"model": "base", "messages": []}))


def test_a_redirection_is_no_answer():
    with other_server(307, b"") as client, pytest.raises(ResourceError, match="the server answers 307"):
        client.models()


def test_an_address_and_a_key_that_can_be_none_are_refused():
    with pytest.raises(ConfigError, match=r"chat\.url must be an address"):
        Client.at("http://127.0.0.1:80x", None)
    with pytest.raises(ConfigError, match=r"chat\.api_key must be of ASCII"):
        Client.at("http://127.0.0.1:80", "schlüssel")


def test_the_base_is_refused_where_the_adapter_is_part_of_the_model(scripted):
    dialogue = Dialogue(scripted[1], [Model("mine", "base")], "mine")
    with pytest.raises(ConfigError, match=r"can't be none: mine is part of the model"):
        dialogue.use("none")


def test_an_adapter_is_called_by_its_runs_name(tmp_path):
    assert adapter_name(tmp_path / "mine" / "final") == "mine"
    assert adapter_name(tmp_path / "other") == "other"


def test_what_is_no_text_is_refused_before_it_is_sent(dialogue):
    dialogue.say("half of a pair: \ud800")
    with pytest.raises(DataError, match=r"the conversation: must be text in UTF-8, and holds '\\ud800'"):
        answered(dialogue)


def test_bytes_that_are_no_text_on_standard_input_are_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8", "strict"))
    with pytest.raises(DataError, match=r"standard input: must be text in UTF-8 \(invalid start byte at byte 1\)"):
        chat_command.main(load_config("chat", ["chat.url=http://127.0.0.1:1"]))
