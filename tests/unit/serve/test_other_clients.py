"""Clients that others wrote: schemathesis asks whatever the schema allows, and langchain as its users do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from lm_eval.models.openai_completions import LocalCompletionsAPI
from pydantic import BaseModel, SecretStr

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from tests.toy_engine import answer
from tests.unit.serve.conftest import ADMIN, KEY, Server


@pytest.mark.long
def test_whatever_the_schema_allows_is_answered_or_refused_with_an_error_object(server: Server):
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/score", "/tokenize", "/admin/adapters"} <= {one.path for one in operations}
    for operation in operations:
        _ask_many_times(operation)


def _ask_many_times(operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def ask(case: Any) -> None:
        response = case.call(headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60)
        assert response.status_code < 500, (operation.label, case.body, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]

    ask()


def chat(server: Server, **arguments: Any) -> ChatOpenAI:
    return ChatOpenAI(model="a1", base_url=f"{server.url}/v1", api_key=SecretStr(KEY), max_retries=0, **arguments)


def test_langchain_asks_and_streams(server: Server):
    model = chat(server, temperature=0, max_completion_tokens=8, seed=1, stream_usage=True)
    whole = model.invoke([HumanMessage("hello")])
    assert whole.response_metadata["finish_reason"] == "length" and whole.usage_metadata["output_tokens"] == 8
    streamed = list(model.stream([HumanMessage("hello")]))
    assert "".join(str(chunk.content) for chunk in streamed) == whole.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in streamed if chunk.usage_metadata) == 8
    assert len(model.batch([[HumanMessage("one")], [HumanMessage("two")]])) == 2


class Setting(BaseModel):
    on: bool
    level: Literal[1, 2, 3]


def test_langchain_gets_objects_by_schema_and_by_tool(server: Server):
    model = chat(server, temperature=1, max_completion_tokens=400, seed=3)
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Setting, method=method).invoke("Light on in the hall"), Setting), method


def test_langchain_gets_embeddings(server: Server):
    model = OpenAIEmbeddings(
        model="base", base_url=f"{server.url}/v1", api_key=SecretStr(KEY), check_embedding_ctx_length=False, max_retries=0
    )
    assert [len(vector) for vector in model.embed_documents(["a", "bc"])] == [2, 2]


def test_lm_eval_scores_given_answers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = f"{server.url}/v1/completions"
    model: Any = LocalCompletionsAPI(url, "huggingface", model="a1", tokenizer=str(tmp_path), max_length=600, max_retries=1)
    before = [*b"to score: "]
    given = answer(before, 1, 3)
    asked = [(("", ""), before, given), (("", ""), before, [*given[:-1], 1 + given[-1]])]
    likeliest, other = 1 - math.log(math.e + len(byte_tokenizer()) - 1), -math.log(math.e + len(byte_tokenizer()) - 1)
    (first, first_is_greedy), (second, second_is_greedy) = model._loglikelihood_tokens(asked)
    assert (first, second) == pytest.approx((3 * likeliest, 2 * likeliest + other), abs=1e-4)
    assert (first_is_greedy, second_is_greedy) == (True, False)
