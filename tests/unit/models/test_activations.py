"""What compiled layers keep."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._functorch import config as partitioner
from torch._inductor import config as inductor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from raytune_llm.errors import ConfigError
from raytune_llm.models.activations import CHECKPOINTING, KeepAttention, compiles, keep
from raytune_llm.models.attention.document_attention import document_attention
from tests.models import tiny_llama


def test_auto_compiles_where_nothing_stands_in_the_way_and_says_what_does() -> None:
    assert compiles("auto", "cuda") == (True, "a GPU")
    assert compiles("auto", "cuda", lacking="Triton is not installed") == (False, "Triton is not installed")
    assert not compiles("auto", "cpu")[0]
    assert compiles("auto", "cuda", never="hooks in the layers", lacking="no Triton") == (False, "hooks in the layers")


def test_compiling_is_refused_where_it_was_asked_for_and_something_lacks() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile can't be true here: Triton is not installed"):
        compiles(True, "cuda", lacking="Triton is not installed")


def test_attention_alone_is_marked_as_kept() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return document_attention(q * 2, k, v, bounds, 4, None, None) + 1

    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    graph = make_fx(attend)(q, k, v, torch.tensor([0, 4, 6], dtype=torch.int32)).graph
    KeepAttention()(graph)
    kept = [node.name for node in graph.nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE]
    assert kept == ["document_attention"]


def test_what_was_compiled_for_another_budget_is_compiled_again() -> None:
    counter = CompileCounter()
    doubled = torch.compile(lambda x: 2 * x, backend=counter)
    with partitioner.patch(activation_memory_budget=CHECKPOINTING["none"].budget), inductor.patch(joint_custom_pre_pass=None):
        for checkpointing, compilations in (("none", 1), ("full", 2), ("full", 2), ("none", 3)):
            keep(tiny_llama().model, [], checkpointing, compile_layers=True)
            doubled(torch.ones(3))
            assert counter.frame_count == compilations
