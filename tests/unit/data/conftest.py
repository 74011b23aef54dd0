from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from raytune_llm.config.load import load_config
from raytune_llm.config.run import PrepareRun
from raytune_llm.data import store as token_store
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.store import Store
from raytune_llm.data.tokens.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as jsonl; a row that is text goes in as it stands."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def prepare_run(tmp_path: Path) -> Callable[..., PrepareRun]:
    """A run over this data with the byte tokenizer, in this process."""

    def load(path: Path, *overrides: str, data: str = "chat") -> PrepareRun:
        settings = [
            "model=tiny_random",
            f"data={data}",
            f"data.path={path}",
            f"data.cache={tmp_path / 'cache'}",
            "resources=inline",
        ]
        return load_config("prepare", [*settings, *overrides])

    return load


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of rows given as (ids, spans), so many a shard."""

    def make(rows: Sequence[tuple[Sequence[int], Sequence[int]]], rows_per_shard: int = 1000) -> Store:
        with token_store.under_construction(tmp_path / "stores", "key") as folder:
            assert folder is not None
            shards = []
            for number, start in enumerate(range(0, len(rows), rows_per_shard)):
                part = [ConversationRow(np.array(ids), np.array(spans)) for ids, spans in rows[start : start + rows_per_shard]]
                shards.append(
                    token_store.write_shard(folder / token_store.shard_name(number), part, Dropped(), kind=KINDS["conversations"])
                )
            token_store.complete(folder, shards, {"rows": len(rows)}, tmp_path / "stores" / "key", kind="conversations")
        return Store.open(tmp_path / "stores" / "key")

    return make
