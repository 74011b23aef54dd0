"""Prompts have the tokens that were trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.serve.api.schema import ChatMessage
from raytune_llm.serve.prompts import Prompts
from tests.unit.serve.conftest import KEY, Server, serving

BOS = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its tokenizer puts a token before each text, as Llama's and Gemma's do."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    assert tokenizer("a").input_ids == [BOS, 97]
    with serving(tmp_path_factory.mktemp("adapters"), tokenizer) as one:
        yield one


def asked(server: Server, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json={"model": "base", **body}, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_plain_text_begins_with_the_token_that_texts_are_trained_with(server: Server):
    def completed(prompt: Any) -> Any:
        answer = asked(server, "/v1/completions", prompt=prompt, temperature=0, max_tokens=8)
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]

    assert completed("ab") == completed([BOS, 97, 98]) != completed([97, 98])
    assert completed("<|im_start|>ab") == completed("ab")  # it stands there already
    texts, ids = (asked(server, "/v1/embeddings", input=given)["data"][0] for given in ("ab", [BOS, 97, 98]))
    assert texts["embedding"] == ids["embedding"]


def test_tokens_are_told_as_they_are_asked_with(server: Server):
    told = asked(server, "/tokenize", prompt="ab")
    assert (told["tokens"], told["prompt"]) == ([BOS, 97, 98], "<|im_start|>ab")
    assert asked(server, "/tokenize", prompt="ab", add_special_tokens=False)["tokens"] == [97, 98]
    messages = [{"role": "user", "content": "a"}]
    rendered = asked(server, "/tokenize", messages=messages)
    assert rendered["prompt"].startswith("<|im_start|>user") and rendered["tokens"][:2] == [BOS, ord("u")]
    assert asked(server, "/tokenize", messages=messages, add_special_tokens=True) == rendered  # which begins with it


def test_an_echo_is_the_text_that_was_given(server: Server):
    answer = asked(server, "/v1/completions", prompt="ab", max_tokens=1, echo=True, logprobs=1)["choices"][0]
    assert answer["text"].startswith("ab") and answer["logprobs"]["tokens"][:3] == ["<|im_start|>", "a", "b"]
    assert answer["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}"
    "{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>{% endfor %}"
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hi", "name": "Ann"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}],
    },
    {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "light"},
]


def test_names_and_ids_of_messages_come_into_the_prompt_as_in_training():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    served = Prompts(tokenizer).chat_text([ChatMessage.model_validate(one) for one in MESSAGES], None, {})
    assert "user Ann: hi" in served and "tool light for c1: done" in served and '[c1 light {"on": true}]' in served
