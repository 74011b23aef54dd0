from __future__ import annotations

import json

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.engines.requests import Grammar

pytest.importorskip("xgrammar")


def test_grammars_that_clients_send_without_end_do_not_fill_the_memory():
    tokenizer = byte_tokenizer()
    limit = 2**20
    grammars = Grammars(tokenizer, len(tokenizer), (tokenizer.eos_token_id,), cache_bytes=limit)
    most = 0
    for number in range(300):
        schema = {"type": "object", "properties": {f"name{number}{field}": {"type": "string"} for field in range(20)}}
        grammars.matcher(Grammar(kind="json_schema", text=json.dumps(schema)))
        most = max(most, grammars.kept_bytes)
    assert limit / 4 < most < 2 * limit
