from __future__ import annotations

import pytest

from raytune_llm.errors import ConfigError
from raytune_llm.train.strategies.fsdp import check_torch


def test_a_torch_that_can_not_shard_a_quantized_base_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"can't shard a quantized base with torch 2\.11\.0.*strategy=ddp"):
        check_torch("2.11.0+cu130")
    check_torch("2.13.0+cpu")
