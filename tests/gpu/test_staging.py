"""A checkpoint that is written while training goes on holds the state of its step."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.train import checkpoint_writer
from raytune_llm.train.checkpoint import Checkpoints
from raytune_llm.train.progress import Progress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("reserved", [False, True])
def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(tmp_path, monkeypatch, reserved):
    monkeypatch.setattr(checkpoint_writer, "PART_BYTES", 2**22)
    state = {f"weight{number}": torch.full((2**20 + number,), 1.0, device="cuda") for number in range(8)}
    state["step"] = torch.tensor(1.0)
    product = torch.randn(8192, 8192, device="cuda")
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=True)
    try:
        if reserved:
            checkpoints.reserve(lambda: state)
        for step in (1, 2):
            for _ in range(20):
                product @ product  # work that the copies wait for
            checkpoints.save(state, Progress(step=step), {})
            product @ product  # beside the copies
            checkpoints.hold()
            for value in state.values():
                value += 1
        checkpoints.wait()
        for step in (1, 2):
            read = {}

            def fill(kept, fetch, read=read):
                read |= {name: torch.empty(value.shape, dtype=value.dtype) for name, value in kept.items()}
                fetch(read)

            checkpoints.load(step, fill)
            assert read.keys() == state.keys()
            assert all(bool((value == step).all()) for value in read.values())
    finally:
        checkpoints.close()


def test_a_temporary_state_is_freed_for_what_waits_for_its_copies(tmp_path):
    before = torch.cuda.memory_allocated()
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=True)
    try:
        checkpoints.save({"weight": torch.zeros(2**26, device="cuda")}, Progress(step=1), {})
        checkpoints.hold()
        assert torch.cuda.memory_allocated() <= before
    finally:
        checkpoints.close()
