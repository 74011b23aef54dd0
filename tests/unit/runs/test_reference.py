"""What a table of reference log-probabilities is found by."""

from __future__ import annotations

from functools import partial

import torch

from raytune_llm.config.load import load_config
from raytune_llm.runs.reference import _key_of

NF4 = ["model=tiny_random", "data=chat_pairs", "data.path=x", "stage=dpo", "quantization=bnb_nf4", "resources=inline"]


def key(*overrides: str) -> object:
    return _key_of(load_config("train", [*NF4, *overrides]), partial(print), [], "rows", torch.float32)


def test_an_adapter_that_begins_as_more_than_its_base_has_a_table_of_its_own() -> None:
    plain = key("adapter=lora")
    assert key("adapter=dora", "quantization=none") == key("adapter=lora", "quantization=none")
    assert key("adapter=rslora") == plain
    assert (
        len({repr(one) for one in (plain, key("adapter=loftq"), key("adapter=pissa"), key("adapter=loftq", "train.seed=1"))}) == 4
    )
