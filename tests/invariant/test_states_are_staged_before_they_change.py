"""Nothing changes a state between its staging and `hold`: on a GPU, the copies are made beside training.

On a CPU they are made at once, and a wrong order leaves no trace in a checkpoint. So the tensors' own counts of changes are
compared here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from raytune_llm import api
from raytune_llm.train import checkpoint
from raytune_llm.train.checkpoint_files import complete_steps
from raytune_llm.train.staging import Staging, local_of
from tests.runs import tiny_run

PAIRS = ("data=prompt_completion_pairs", "data.packing=false", "stage=dpo", "stage.reference=online")
FULL = ("adapter=none", "optimizer.weight_decay=0")


class Watched(Staging):
    held = 0

    def __init__(self) -> None:
        super().__init__()
        self._staged: list[tuple[str, Tensor, int]] = []

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._look()
        self._staged = [(name, local := local_of(value), local._version) for name, value in state.items()]
        return super().copy(state)

    def hold(self) -> None:
        self._look()
        super().hold()

    def _look(self) -> None:
        Watched.held += bool(self._staged)
        changed = [name for name, value, version in self._staged if value._version != version]
        assert not changed, changed
        self._staged = []


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=schedule_free", "schedule=constant"),
        (*FULL, "optimizer=badam", "optimizer.switch_every=1"),
        ("optimizer=lomo", "train.max_grad_norm=null", "train.micro_batch_size=8"),
        (*PAIRS, *FULL),
    ],
)
def test_nothing_changes_a_state_before_it_is_held(
    overrides: tuple[str, ...], chat_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "Staging", Watched)
    monkeypatch.setattr(Watched, "held", 0)
    rows: Any = chat_rows
    if "stage=dpo" in overrides:
        rows = tmp_path / "pairs.jsonl"
        pair = {"prompt": "one two", "chosen": "three four", "rejected": "five"}
        rows.write_text("\n".join(json.dumps({**pair, "prompt": f"one {number}"}) for number in range(40)))
    every = ("checkpoint.asynchronous=true", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.eval_every_steps=2")
    run = tiny_run(str(rows), str(tmp_path / "cache"), tmp_path / "out", *every, "train.max_steps=4", *overrides)
    api.train(run)
    assert complete_steps(tmp_path / "out" / "checkpoints") == [1, 2, 3, 4]
    assert Watched.held >= 3
