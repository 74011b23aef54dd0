"""What EVA looks at before it decomposes it."""

from __future__ import annotations

import torch

from raytune_llm.models.adapters.eva import Components


def test_fewer_tokens_than_a_decomposition_takes_wait_for_the_next_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 16)
    apart, together = Components(4, 16), Components(4, 16)
    apart.add(x[:7])
    assert apart.directions() is None
    apart.add(x[7:])
    together.add(x)
    found, expected = apart.directions(), together.directions()
    assert found is not None and expected is not None and torch.equal(found, expected)
