"""The API over a toy model, asked by OpenAI's own client."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.serve import backend
from raytune_llm.serve.prompts import Prompts
from tests.toy_engine import adapter_folder, following
from tests.unit.serve.conftest import ADMIN, KEY, Server, serving

ASK = [{"role": "user", "content": "hello"}]


def post(server: Server, path: str, body: dict, key: str = KEY, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={"Authorization": f"Bearer {key}", **headers}, timeout=30)


def chat(server: Server, **body) -> httpx.Response:
    return post(server, "/v1/chat/completions", {"model": "base", "messages": ASK, "temperature": 0, "max_tokens": 5, **body})


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# Models ---------------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(server: Server):
    assert {"base", "a1", "a2"} <= {model.id for model in server.client.models.list()}
    assert server.client.models.retrieve("a1").id == "a1"
    listed = {one.id: one.model_dump() for one in server.client.models.list()}
    assert (listed["base"]["parent"], listed["a1"]["parent"], listed["a1"]["max_model_len"]) == (None, "base", 600)
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_an_unknown_model_is_404(server: Server):
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="other", messages=ASK)


# Completions ----------------------------------------------------------------------------------------------------------


def test_streamed_and_whole_answers_agree(server: Server):
    arguments = {"model": "a1", "messages": ASK, "temperature": 0, "max_completion_tokens": 12}
    whole = server.client.chat.completions.create(**arguments)
    chunks = list(server.client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == whole.usage.prompt_tokens + 12


def test_adapters_answer_differently(server: Server):
    texts = {chat(server, model=name).json()["choices"][0]["message"]["content"] for name in ("base", "a1", "a2")}
    assert len(texts) == 3


def test_n_gives_so_many_choices_and_seeds_repeat(server: Server):
    first, again, other = (
        [choice["message"]["content"] for choice in chat(server, n=3, temperature=2, seed=seed).json()["choices"]]
        for seed in (5, 5, 6)
    )
    assert len(set(first)) == 3 and first == again and first != other


def test_without_temperature_choices_are_alike_and_the_prompt_counts_once(server: Server):
    answer = chat(server, n=2).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts[0] == texts[1]
    assert answer["usage"]["prompt_tokens"] == chat(server).json()["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 10


def test_stop_strings_are_no_part_of_the_answer(server: Server):
    text = chat(server, max_tokens=40, logit_bias={"65": 0}).json()["choices"][0]["message"]["content"]
    stop = text[5:7]
    answer = chat(server, max_tokens=40, stop=[stop]).json()["choices"][0]
    assert answer["message"]["content"] == text[: text.index(stop)] and answer["finish_reason"] == "stop"


def test_logprobs_are_told_for_each_token(server: Server):
    choice = server.client.chat.completions.create(
        model="base", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 4
    for one in choice.logprobs.content:
        assert one.logprob == max(top.logprob for top in one.top_logprobs) and len(one.top_logprobs) == 3
    streamed = server.client.chat.completions.create(
        model="base", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3, stream=True
    )
    told = [one for chunk in streamed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or ()]
    assert told == choice.logprobs.content


def test_plain_completions_take_texts_and_tokens(server: Server):
    text = server.client.completions.create(model="base", prompt="ab", temperature=0, max_tokens=3, echo=True).choices[0].text
    both = server.client.completions.create(model="base", prompt=["ab", "cd"], temperature=0, max_tokens=3)
    ids = server.client.completions.create(model="base", prompt=[97, 98], temperature=0, max_tokens=3)
    assert text == "ab" + both.choices[0].text and both.choices[0].text == ids.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1]
    following_ids = [97, 98]
    for _ in range(3):
        following_ids.append(following(following_ids, 0))
    assert ids.choices[0].text == bytes(following_ids[2:]).decode(errors="replace")


@pytest.mark.parametrize("stream", [True, False])
def test_an_echoed_prompt_has_its_log_probabilities(server: Server, stream: bool):
    prompts = ["abc", "abc", "é!", "é!"]
    answered = server.client.completions.create(
        model="a1", prompt=["abc", "é!"], temperature=0, max_tokens=2, n=2, echo=True, logprobs=2, stream=stream
    )
    choices = [choice for chunk in ([*answered] if stream else [answered]) for choice in chunk.choices]
    for index, prompt in enumerate(prompts):
        told = [choice for choice in choices if choice.index == index]
        ids = list(prompt.encode())
        tokens, values, top, places = (
            [item for choice in told if choice.logprobs for item in getattr(choice.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        assert "".join(choice.text for choice in told).startswith(prompt)
        assert len(tokens) == len(values) == len(top) == len(places) == len(ids) + 2
        assert values[0] is None and top[0] is None and all(len(one) in (2, 3) for one in top[1:])
        assert all(one[token] == value for one, token, value in zip(top[1:], tokens[1:], values[1:], strict=True))
        assert values[1:-2] == pytest.approx([logprob_of(ids[:at], ids[at], weights=1) for at in range(1, len(ids))])
        assert all(value <= max(one.values()) for one, value in zip(top[1:], values[1:], strict=True))
        assert tokens[: len(ids)] == (["a", "b", "c"] if prompt == "abc" else ["bytes:\\xc3", "bytes:\\xa9", "!"])
        assert places[: len(ids)] == ([0, 1, 2] if prompt == "abc" else [0, 0, 1])


def test_an_echo_is_the_text_that_was_given_with_its_special_tokens(server: Server):
    prompt = "<|im_start|>user\nhé<|im_end|>\n"
    asked = {"model": "base", "prompt": prompt, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 0}
    choice = post(server, "/v1/completions", asked).json()["choices"][0]
    told = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    for token, place in list(zip(told["tokens"], told["text_offset"], strict=True))[:-2]:
        assert token.startswith("bytes:") or prompt[place:].startswith(token)
    chosen = zip(told["tokens"], told["token_logprobs"], strict=True)
    assert told["top_logprobs"] == [value and {token: value} for token, value in chosen]


def test_a_stop_string_may_be_a_special_token(server: Server):
    start = byte_tokenizer().convert_tokens_to_ids("<|im_start|>")
    for min_tokens in (0, 3):
        asked = {"stop": ["<|im_start|>"], "logit_bias": {str(start): 100}, "max_tokens": 5, "min_tokens": min_tokens}
        choice = chat(server, **asked).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "<|im_start|>" * min_tokens)


def logprob_of(before: list[int], token: int, weights: int) -> float:
    """Of the toy model's, whose logits are 1 for one token and 0 for all others."""
    total = math.e + len(byte_tokenizer()) - 1
    return (1.0 if token == following(before, weights) else 0.0) - math.log(total)


@pytest.mark.parametrize("longer", [{"min_tokens": 90}, {"ignore_eos": True}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_that_should_be_longer_than_its_grammar_allows_is_whole(server: Server, longer: dict, temperature: float):
    asked = {"structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 100, "temperature": temperature, "seed": 3, **longer}
    (choice,) = chat(server, **asked).json()["choices"]
    assert choice["message"]["content"] in ("yes", "no") and choice["finish_reason"] == "stop"


def test_a_json_schema_is_kept(server: Server):
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "level": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["on", "level"],
        "additionalProperties": False,
    }
    for seed in range(5):
        choice = server.client.chat.completions.create(
            model="base", messages=ASK, temperature=1, seed=seed, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "light", "schema": schema}},
        ).choices[0]  # fmt: skip
        if choice.finish_reason == "stop":
            said = json.loads(choice.message.content or "")
            assert isinstance(said["on"], bool) and 0 <= said["level"] <= 9


def test_keywords_of_a_schema_that_are_not_enforced_are_named_or_refused(server: Server):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    tool = {"name": "light", "parameters": {"properties": {"levels": schema}}}
    format: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    named = chat(server, response_format=format)
    assert named.headers["x-ignored-fields"] == "response_format.json_schema.schema.uniqueItems"
    forced = chat(server, tools=[{"type": "function", "function": tool}], tool_choice="required")
    assert forced.headers["x-ignored-fields"] == "tools.function.parameters.uniqueItems"
    format["json_schema"]["strict"] = True
    strict = {"tools": [{"type": "function", "function": {**tool, "strict": True}}], "tool_choice": "required"}
    vllms = [{"structured_outputs": {"json": form}} for form in (schema, json.dumps(schema))]
    for asked in ({"response_format": format}, strict, *vllms):
        refused = chat(server, **asked)
        assert refused.status_code == 400 and "can't be enforced: uniqueItems" in error_of(refused)["message"]


def test_schemas_and_counts_that_take_long_to_compile_are_refused(server: Server):
    many = {"type": "object", "properties": {str(number): {} for number in range(3000)}}
    for asked in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": many}}},
        {"structured_outputs": {"json": many}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": many}}], "tool_choice": "required"},
    ):
        refused = chat(server, **asked)
        assert refused.status_code == 400 and "at most 500 optional properties, got 3000" in error_of(refused)["message"]
    for asked in ({"regex": "[a-z]{1,50000}"}, {"grammar": "root ::= [a-z]{1,50000}"}):
        refused = chat(server, structured_outputs=asked)
        assert refused.status_code == 400 and "must be at most 128, got 50000" in error_of(refused)["message"]


@pytest.mark.parametrize("choice", ["a-b c#d&e~f", 'a\n"b', "x(y)[z]{1}^$|", "é😀", "\\d", "a\tb*?+."])
def test_choices_are_taken_as_they_are(server: Server, choice: str):
    asked = {"structured_outputs": {"choice": [choice]}, "max_tokens": 60}
    assert chat(server, **asked).json()["choices"][0]["message"]["content"] == choice


def test_what_xgrammar_says_of_a_grammar_is_told_without_places_in_its_source(server: Server):
    for asked in ({"regex": "("}, {"grammar": "nonsense"}, {"json": {"type": "nope"}}):
        message = error_of(chat(server, structured_outputs=asked))["message"]
        assert "must be one that xgrammar compiles" in message and ".cc" not in message


def test_an_answer_that_its_grammar_leads_nowhere_is_an_error(server: Server):
    grammar = 'root ::= "a" more\nmore ::= more'
    response = chat(server, structured_outputs={"grammar": grammar}, max_tokens=20)
    assert response.status_code == 400 and "no token is left" in error_of(response)["message"]
    assert chat(server).status_code == 200


def test_a_choice_and_a_regex_are_kept(server: Server):
    assert chat(server, structured_outputs={"choice": ["yes", "no"]}).json()["choices"][0]["message"]["content"] in ("yes", "no")
    text = chat(server, structured_outputs={"regex": "[0-9]{3}"}).json()["choices"][0]["message"]["content"]
    assert re.fullmatch("[0-9]{3}", text)


def test_a_required_tool_is_called(server: Server):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "light", "parameters": schema}}
    arguments = {"model": "base", "messages": ASK, "tools": [tool], "tool_choice": "required", "max_tokens": 200, "seed": 1}
    choice = server.client.chat.completions.create(**arguments).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    called = choice.message.tool_calls[0].function
    assert called.name == "light" and isinstance(json.loads(called.arguments)["on"], bool)
    chunks = list(server.client.chat.completions.create(**arguments, stream=True))
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in streamed if call.id] == ["light"] and streamed[0].id
    assert "".join(call.function.arguments for call in streamed) == called.arguments
    assert len(streamed) > 2  # they come as they are made
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 3), ("top_p", 2), ("top_p", 0), ("max_tokens", 0), ("max_tokens", -5),
        ("max_completion_tokens", 0), ("n", 0), ("n", 1000), ("presence_penalty", -3), ("frequency_penalty", 9),
        ("logit_bias", {"x": 1}), ("logit_bias", {"99999": 1}), ("logit_bias", {"1": 101}), ("stop", [""]), ("stop", ["a"] * 17),
        ("logit_bias", {"²": 1}), ("logit_bias", {"٣": 1}), ("logit_bias", {"9" * 5000: 1}), ("stop", ""), ("stop", "a" * 2000),
        ("top_logprobs", 3), ("messages", []), ("messages", [{"role": "robot", "content": "x"}]), ("messages", "hello"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.org"}}]}]),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}), ("tool_choice", "required"),
        ("stream_options", {"include_usage": True}), ("nonsense", 1), ("seed", "x"), ("min_tokens", 9), ("ignored", ["x"]),
        ("structured_outputs", {"regex": "["}), ("structured_outputs", {"json": {}, "regex": "a"}),
        ("chat_template_kwargs", {"evil": 1}), ("messages", [{"role": "user"}]), ("temperature", "0.5"), ("temperature", True),
        ("max_tokens", "5"), ("max_tokens", 5.0), ("n", True), ("stream", "yes"), ("logprobs", 1), ("ignore_eos", "true"),
        ("top_k", 2**31), ("top_k", 10**400), ("logit_bias", {"1": "1"}), ("stop", [1]), ("max_completion_tokens", 6),
        ("messages", [{"role": "user", "content": 5}]), ("parallel_tool_calls", "no"), ("structured_outputs", {"json_": {}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema_": {}}}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_400_with_an_error_object(server: Server, field: str, value: object):
    response = chat(server, **{field: value})
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"
    assert chat(server).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "logit_bias"])
def test_what_is_no_number_is_400(server: Server, field: str, number: str):
    value = f'{{"1": {number}}}' if field == "logit_bias" else number
    response = sent(server, "/v1/chat/completions", f'{{{ASKED % "x"}, "{field}": {value}}}')
    assert response.status_code == 400 and field in str(error_of(response)["param"])


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"top_k": 2**31 - 1}, {"best_of": 2, "n": 2}, {"echo": None}])
def test_whatever_is_allowed_is_answered(server: Server, fields: dict):
    asked = {"model": "base", "prompt": "ab", "max_tokens": 2, **fields}
    assert post(server, "/v1/completions", asked).status_code == 200
    assert post(server, "/v1/completions", {**asked, "best_of": 3}).status_code == 400
    assert post(server, "/v1/completions", {**asked, "n": 16, "prompt": ["ab"] * 17, "best_of": None}).status_code == 400


def sent(server: Server, path: str, body: str, type: str = "application/json") -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", "content-type": type}
    return httpx.post(f"{server.url}{path}", content=body, headers=headers)


HALF = "\\ud800"
ASKED = '"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "%s"}]'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", f"{{{ASKED % HALF}}}"),
        ("/v1/chat/completions", f'{{{ASKED % "x"}, "chat_template_kwargs": {{"{HALF}": 1}}}}'),
        ("/v1/chat/completions", f'{{{ASKED % "x"}, "structured_outputs": {{"choice": ["{HALF}"]}}}}'),
        ("/v1/completions", f'{{"model": "base", "prompt": ["a", "{HALF}"]}}'),
        ("/v1/embeddings", f'{{"model": "base", "input": "{HALF}"}}'),
        ("/tokenize", f'{{"model": "base", "prompt": "{HALF}"}}'),
    ],
)
def test_a_text_that_is_no_unicode_is_400(server: Server, path: str, body: str):
    response = sent(server, path, body)
    assert response.status_code == 400, response.text
    error_of(response)


def test_a_line_break_in_a_path_begins_no_line_of_the_log(server: Server, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="raytune_llm.serve"):
        httpx.get(f"{server.url}/v1/models/x%0Aforged%00", headers={"Authorization": f"Bearer {KEY}"})
        message = next(found for found in iter(lambda: _logged(caplog, "forged"), None) if found)
    assert "/v1/models/x%0Aforged%00 404" in message and "\n" not in message


def _logged(caplog: pytest.LogCaptureFixture, word: str) -> str:
    time.sleep(0.01)
    return next((message for message in caplog.messages if word in message), "")


def test_an_error_names_the_field_in_the_form_that_fits_best(server: Server):
    def wrong(**fields: Any) -> tuple[str | None, str]:
        error = error_of(chat(server, **fields))
        return error["param"], error["message"]

    image = {"type": "image_url", "image_url": {"url": "http://example.org"}}
    assert wrong(messages=[{"role": "user", "content": [image]}])[0] == "messages.0.content.0.type"
    assert wrong(stop=["a"] * 17) == ("stop", "stop: List should have at most 16 items after validation, not 17")
    assert wrong(stream_options={}) == (None, "stream_options may be given with stream=true only")
    body = f"{{{ASKED % 'x'}}}"
    assert "content-type" in error_of(sent(server, "/v1/chat/completions", body, "text/plain"))["message"]
    assert sent(server, "/v1/chat/completions", body, "application/json; charset=utf-8").status_code == 200
    assert error_of(sent(server, "/v1/chat/completions", body[:-1])) | {"code": None} == {
        "message": "The body must be JSON", "type": "invalid_request_error", "param": None, "code": None
    }  # fmt: skip


def test_a_long_text_is_encoded_while_others_are_answered(tmp_path: Path):
    tokenizer, encoding, encoded = byte_tokenizer(), threading.Event(), threading.Event()

    class Slow(Prompts):
        def _encoded(self, text: str) -> list[int]:
            if len(text) > 15_000:
                encoding.set()
                assert encoded.wait(30)
            return super()._encoded(text)

    with serving(tmp_path, tokenizer, prompts=Slow(tokenizer)) as server, ThreadPoolExecutor() as pool:
        long = pool.submit(post, server, "/tokenize", {"model": "base", "prompt": "é" * 15_001})
        assert encoding.wait(30)
        assert post(server, "/tokenize", {"model": "base", "prompt": "ab"}).json()["tokens"] == [97, 98]
        assert not long.done()
        encoded.set()
        assert long.result().json()["tokens"] == [0xC3, 0xA9] * 15_001


def test_fields_that_change_nothing_are_named(server: Server):
    response = chat(server, user="me", metadata={"a": "b"}, presence_penalty=0)
    assert response.status_code == 200 and response.headers["x-ignored-fields"] == "metadata, user"


def test_fields_that_change_nothing_beside_others_or_with_this_template_are_named(server: Server):
    settings = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    named = chat(server, **settings).headers["x-ignored-fields"]
    assert named == "chat_template_kwargs.enable_thinking, reasoning_effort"
    tool = {"type": "function", "function": {"name": "light"}}
    forced = chat(server, tools=[tool], tool_choice="required", max_tokens=60, response_format={"type": "json_object"})
    assert forced.headers["x-ignored-fields"] == "response_format"
    assert "x-ignored-fields" not in chat(server, tools=[tool], tool_choice="none").headers
    options = {"include_obfuscation": True, "continuous_usage_stats": True}
    told = chat(server, tools=[tool], stream=True, stream_options=options).headers["x-ignored-fields"]
    assert told == "stream_options.continuous_usage_stats, stream_options.include_obfuscation, tools"
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert post(server, path, {"model": "base", "user": "me", **body}).headers["x-ignored-fields"] == "user"


def test_vllm_s_numbers_of_adapters_are_ignored_by_name(server: Server):
    body = {"lora_name": "numbered", "lora_path": str(adapter_folder(server.root / "numbered", 4)), "lora_int_id": 7}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        response = post(server, path, body, ADMIN)
        assert response.status_code == 200 and response.headers["x-ignored-fields"] == "lora_int_id"
        body.pop("lora_path", None)  # unloading has none


def test_what_fails_here_is_an_error_object_with_the_id_of_its_request(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Fails(Prompts):
        def exact_text(self, ids: Any) -> str:
            raise RuntimeError("by accident")

    with serving(tmp_path, byte_tokenizer(), prompts=Fails(byte_tokenizer())) as server:
        body = {"model": "base", "tokens": [97]}
        response = post(server, "/detokenize", body, **{"x-request-id": "mine"})
        assert response.status_code == 500 and error_of(response)["type"] == "server_error"
        assert response.headers["x-request-id"] == "mine"
        assert "mine failed" in caplog.text and "by accident" in caplog.text


def test_the_api_s_description_names_keys_errors_and_all_fields(server: Server):
    described = httpx.get(f"{server.url}/openapi.json").json()
    asked = described["paths"]["/v1/chat/completions"]["post"]
    assert asked["security"] == [{"HTTPBearer": []}]
    assert {"200", "4XX", "5XX"} == set(asked["responses"]) and "text/event-stream" in asked["responses"]["200"]["content"]
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert "ignored" not in fields and "parallel_tool_calls" in fields


def test_a_prompt_that_is_too_long_is_400(server: Server):
    response = chat(server, messages=[{"role": "user", "content": "x" * 700}])
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
    assert chat(server, max_tokens=10_000).status_code == 400


def test_a_body_that_is_too_large_is_413(server: Server):
    assert error_of(chat(server, messages=[{"role": "user", "content": "x" * 200_000}]))["code"] == "body_too_large"

    def pieces():
        for _ in range(30):
            yield b" " * 10_000

    response = httpx.post(f"{server.url}/v1/chat/completions", content=pieces(), headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 413


def test_keys_are_asked_for(server: Server):
    for key in ("-", "wrong", KEY + "x"):
        response = post(server, "/v1/chat/completions", {"model": "base", "messages": ASK}, key)
        assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}).status_code == 401


def test_a_null_and_the_text_modality_ask_for_nothing(server: Server):
    for name in ("audio", "prediction", "moderation", "web_search_options", "functions", "function_call"):
        assert chat(server, **{name: None}).status_code == 200
        assert chat(server, **{name: {}}).status_code == 400
    assert chat(server, modalities=["text"]).status_code == 200 and chat(server, modalities=["audio"]).status_code == 400


def test_what_is_not_there_is_an_error_object_too(server: Server):
    assert error_of(httpx.get(f"{server.url}/nothing"))["code"] == "not_found"
    assert error_of(httpx.get(f"{server.url}/v1/chat/completions"))["code"] == "method_not_allowed"
    broken = httpx.post(f"{server.url}/v1/chat/completions", content=b"{", headers={"Authorization": f"Bearer {KEY}"})
    assert broken.status_code == 400 and error_of(broken)


def test_no_site_may_ask_from_a_browser(server: Server):
    response = httpx.options(f"{server.url}/v1/models", headers={"Origin": "http://evil", "Access-Control-Request-Method": "GET"})
    assert "access-control-allow-origin" not in response.headers


def test_requests_are_named(server: Server):
    assert chat(server).headers["x-request-id"].startswith("req-")
    named = post(server, "/v1/chat/completions", {"model": "base", "messages": ASK, "max_tokens": 1}, **{"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"


# Adapters -------------------------------------------------------------------------------------------------------------


def test_adapters_come_change_and_go(server: Server):
    folder = adapter_folder(server.root / "live", 5)
    body = {"lora_name": "live", "lora_path": str(folder)}
    first = post(server, "/v1/load_lora_adapter", body, ADMIN)
    assert first.status_code == 200
    before = chat(server, model="live").json()
    assert "LoRA adapter 'live' added successfully" in first.text  # vLLM's clients search these texts
    again = post(server, "/v1/load_lora_adapter", body, ADMIN)
    assert again.status_code == 400 and "has already been loaded" in error_of(again)["message"]
    adapter_folder(folder, 6)
    second = post(server, "/v1/load_lora_adapter", {**body, "load_inplace": True}, ADMIN)
    assert second.json()["version"] != first.json()["version"]
    after = chat(server, model="live").json()
    assert before["choices"] != after["choices"]
    assert post(server, "/admin/adapters/live/pin", {"pinned": True}, ADMIN).json()["pinned"]
    listed = httpx.get(f"{server.url}/admin/adapters", headers={"Authorization": f"Bearer {ADMIN}"}).json()["adapters"]
    assert {one["name"]: one["pinned"] for one in listed}["live"]
    unloaded = post(server, "/v1/unload_lora_adapter", {"lora_name": "live"}, ADMIN)
    assert unloaded.status_code == 200 and "LoRA adapter 'live' removed successfully" in unloaded.text
    assert chat(server, model="live").status_code == 404
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "live"}, ADMIN).status_code == 404


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "base", "x" * 200, "a\nb", ".hidden", "a..b"])
def test_a_bad_name_is_refused(server: Server, name: str):
    body = {"lora_name": name, "lora_path": str(server.root / "a1")}
    assert post(server, "/v1/load_lora_adapter", body, ADMIN).status_code == 400


def test_a_folder_outside_is_refused(server: Server, tmp_path):
    outside = adapter_folder(tmp_path / "outside", 3)
    (server.root / "link").symlink_to(outside)
    inside = adapter_folder(server.root / "inside", 3)
    (inside / "extra.safetensors").symlink_to(outside / "adapter_model.safetensors")
    loop = adapter_folder(server.root / "loop", 3)
    (loop / "circle").symlink_to(loop / "circle")
    a_file = server.root / "a1" / "adapter_config.json"
    outer = (outside, server.root / "link", server.root / ".." / "x", "/etc", "/no/such/folder")
    for place in (loop, a_file, inside, "a\0b", "x" * 5000, *outer):
        response = post(server, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(place)}, ADMIN)
        assert response.status_code == 400, place
        assert ("must be inside a folder" in error_of(response)["message"]) == (place in outer)
    missing = post(server, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(server.root / "nothing")}, ADMIN)
    assert missing.status_code == 404 and "must exist" in error_of(missing)["message"]
    bad = adapter_folder(server.root / "bad", -1)
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(bad)}, ADMIN).status_code == 400
    assert chat(server).status_code == 200


# Under load -----------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_client_that_goes_away_frees_its_row(server: Server):
    server.runner.delay_s = 0.02
    body = {"model": "base", "messages": ASK, "max_tokens": 500, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, headers=headers) as answer:
            next(answer.iter_lines())
        wait_for(lambda: server.engine.stats().running == 0)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=0.3)
        wait_for(lambda: server.engine.stats().running == 0, seconds=2.0)
    finally:
        server.runner.delay_s = 0.0


def test_texts_of_a_client_that_goes_away_are_given_up(server: Server):
    """A pass of one text between two steps of a stream, which take 20 ms: 5 s for all."""
    server.runner.delay_s = 0.02
    headers = {"Authorization": f"Bearer {KEY}"}
    texts = {"model": "base", "input": ["a" * 60] * 250}
    body = {"model": "base", "messages": ASK, "max_tokens": 500, "ignore_eos": True, "stream": True}
    before = len(server.runner.passes)
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as answer:
            lines = answer.iter_lines()  # one that is thrown away closes the connection
            next(lines)
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/v1/embeddings", json=texts, headers=headers, timeout=0.3)
            wait_for(lambda: server.engine.stats().running == 1 and not server.engine.stats().waiting)
        assert len(server.runner.passes) - before < 250
        wait_for(lambda: server.engine.stats().running == 0)
    finally:
        server.runner.delay_s = 0.0


def test_too_many_requests_are_429_at_once(server: Server):
    server.runner.go.clear()
    threads = [threading.Thread(target=lambda: chat(server)) for _ in range(42)]
    try:
        for thread in threads:
            thread.start()
        wait_for(lambda: server.engine.stats().waiting >= 32, seconds=30)
        response = chat(server)  # while nothing is computed
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1" and error_of(response)["code"] == "rate_limit_exceeded"
    finally:
        server.runner.go.set()
        for thread in threads:
            thread.join()
    assert chat(server).status_code == 200


def test_metrics_have_the_field_s_names(server: Server):
    chat(server)
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket", "vllm:generation_tokens_total",
                 "raytune_llm:adapter_resident", 'vllm:request_success_total{finished_reason="length"'):  # fmt: skip
        assert name in text


def test_metrics_name_the_adapters_of_running_and_waiting_requests(tmp_path: Path):
    def labels(server: Server) -> set[str]:
        text = httpx.get(f"{server.url}/metrics").text
        return {line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")}

    with serving(tmp_path, byte_tokenizer(), slots=1) as server:
        assert 'max_lora="1"' in labels(server).pop()
        long = Sampling(max_new_tokens=500, ignore_end=True)
        server.runner.go.clear()
        streams = [server.engine.submit(Request(prompt_ids=[97], adapter="a1", sampling=long))]
        try:
            wait_for(lambda: server.engine.stats().running == 1)
            streams.append(server.engine.submit(Request(prompt_ids=[97], adapter="a2", sampling=long)))
            server.runner.go.set()  # a step or a few: the second request comes to the scheduler before the next
            server.runner.go.clear()
            wait_for(lambda: server.engine.stats().waiting_adapters == ("a2",))
            (told,) = labels(server)
            assert 'running_lora_adapters="a1"' in told and 'waiting_lora_adapters="a2"' in told
        finally:
            for stream in streams:
                stream.cancel()
            server.runner.go.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_failed_or_is_silent_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(pieces: object) -> None:
        raise RuntimeError("the device is gone")

    with serving(tmp_path, byte_tokenizer()) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        monkeypatch.setattr(backend, "STALLED_S", -1.0)
        silent = httpx.get(f"{server.url}/health")
        assert silent.status_code == 503 and "no heartbeat" in error_of(silent)["message"]
        monkeypatch.undo()
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.runner.run = fails
        assert chat(server).status_code == 503
        failed = httpx.get(f"{server.url}/health")
        assert failed.status_code == 503 and "the device is gone" in error_of(failed)["message"]


def test_latencies_are_of_each_answer_of_a_request(server: Server):
    def count(name: str) -> int:
        text = httpx.get(f"{server.url}/metrics").text
        return int(float(re.search(rf"^{name}_count{{.*}} (\S+)$", text, re.MULTILINE)[1]))  # type: ignore[index]

    kinds = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
    names = [f"vllm:{what}_seconds" for what in kinds]
    before = [count(name) for name in names]
    answered = chat(server, n=3, max_tokens=5, ignore_eos=True, temperature=0)
    assert answered.json()["usage"]["completion_tokens"] == 15
    assert [count(name) - old for name, old in zip(names, before, strict=True)] == [3, 3 * 4, 3, 3]
