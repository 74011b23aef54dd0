from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.serve.api.app import build_app
from raytune_llm.serve.api.server import Access
from raytune_llm.serve.backend import InProcessBackend, ModelFacts
from raytune_llm.serve.prompts import Prompts
from tests.toy_engine import ToyRunner, adapter_folder

KEY, ADMIN = "user-key-1234", "admin-key-1234"


@dataclass
class Server:
    url: str
    engine: NativeEngine
    runner: Any
    root: Path
    client: Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("adapters"), byte_tokenizer()) as one:
        yield one


@contextmanager
def serving(root: Path, tokenizer: Any, *, slots: int = 4, prompts: Prompts | None = None) -> Iterator[Server]:
    """The API over a toy model, on a port of its own: 8 rows, adapters a1 and a2 in `root`."""
    runner: Any = ToyRunner(num_blocks=512, block_size=4, vocab_size=len(tokenizer), slots=slots)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    engine = NativeEngine(runner, tokenizer, end_ids=[end], max_length=600, max_rows=8, step_tokens=64)
    for number in (1, 2):
        engine.add_adapter(f"a{number}", adapter_folder(root / f"a{number}", number))
    facts = ModelFacts(name="base", max_length=engine.max_length, hidden_size=4, scores=False)
    backend = InProcessBackend(engine, facts, max_waiting=32)
    access = Access(api_key=KEY, admin_key=ADMIN, roots=[root], max_body_bytes=100_000)
    config = uvicorn.Config(build_app(backend, prompts or Prompts(tokenizer), access), port=0, log_level="warning")
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        yield Server(url, engine, runner, root, OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0))
    finally:
        http.should_exit = True
        thread.join()
        engine.close()
