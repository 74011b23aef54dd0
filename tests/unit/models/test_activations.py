"""What compiled layers keep."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from raytune_llm.models.activations import KeepAttention
from raytune_llm.models.document_attention import document_attention


def test_attention_alone_is_marked_as_kept() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return document_attention(q * 2, k, v, bounds, 4, None, None) + 1

    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    graph = make_fx(attend)(q, k, v, torch.tensor([0, 4, 6], dtype=torch.int32)).graph
    KeepAttention()(graph)
    kept = [node.name for node in graph.nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE]
    assert kept == ["document_attention"]
