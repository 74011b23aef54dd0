"""S2 attention on a GPU: every back end gives what masks give in float32, compiled or not."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_fast_paths import batch, error, loss_and_gradients, policy, same_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GROUPS = "model.shift_attn_tokens=64"


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_bf16_step_in_groups_is_as_near_to_float32_as_one_without(backend: str, compiled: str) -> None:
    torch._dynamo.reset()
    plain = policy("train.precision=fp32", "train.compile=false", "model.attention=sdpa", GROUPS)
    fast = policy("train.precision=bf16", f"train.compile={compiled}", f"model.attention={backend}", GROUPS)
    whole = policy("train.precision=fp32", "train.compile=false", "model.attention=sdpa")
    same_weights(plain, fast)
    same_weights(plain, whole)
    packs = batch(200, 31, 7, 120)
    wanted, got, of_all = (loss_and_gradients(one, packs) for one in (plain, fast, whole))
    assert not torch.equal(of_all["loss"], wanted["loss"])
    assert wanted.keys() == got.keys()
    assert error(got["loss"], wanted["loss"]) < 3e-3
    for name in wanted:
        assert error(got[name], wanted[name]) < 2.5e-2, name


def test_batches_with_other_boundaries_compile_nothing_again_in_groups() -> None:
    torch._dynamo.reset()
    model = policy("train.precision=bf16", "train.compile=true", GROUPS)
    for lengths in [(200, 31, 7, 120), (100, 100, 50)]:
        loss_and_gradients(model, batch(*lengths))
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for lengths in [(150, 150, 20), (129, 1, 1, 1, 1), (256, 256)]:
            loss_and_gradients(model, batch(*lengths))
    finally:
        torch.compiler.set_stance("default")
