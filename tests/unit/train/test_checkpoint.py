from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from raytune_llm.errors import DataError
from raytune_llm.train.checkpoint import (
    PROGRESS,
    Checkpoints,
    Progress,
    Staging,
    _raise_interrupt,
    complete_steps,
    newest_sound,
    path_of,
    read_progress,
    sweep,
)

STATE = {"parameters.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, keep=2, asynchronous=False)
    yield made
    made.close()


def test_what_is_saved_comes_back(checkpoints, tmp_path):
    progress = Progress(step=3, epoch=1, cursor=7, source_state={"asked": 2}, enricher_states=[None, [0.5, 2.0]])
    checkpoints.save(STATE, progress, {"settings": "{}"})
    assert read_progress(tmp_path, 3) == (progress, {"settings": "{}"})
    read_back = {"parameters.weight": torch.zeros(2, 3)}
    checkpoints.load(3, lambda sizes, read: read(read_back))
    assert torch.equal(read_back["parameters.weight"], STATE["parameters.weight"])


def test_the_newest_stay(checkpoints, tmp_path):
    for step in (2, 4, 6):
        checkpoints.save(STATE, Progress(step=step), {})
    assert complete_steps(tmp_path) == [4, 6]


def test_what_was_not_finished_is_swept_away(checkpoints, tmp_path):
    checkpoints.save(STATE, Progress(step=2), {})
    path_of(tmp_path, 4).mkdir()
    sweep(tmp_path)
    assert not path_of(tmp_path, 4).exists() and newest_sound(tmp_path) == 2


@pytest.mark.parametrize("version", [None, 1, 99])
def test_a_checkpoint_of_another_format_is_refused(checkpoints, tmp_path, version):
    checkpoints.save(STATE, Progress(step=2), {})
    path = path_of(tmp_path, 2) / PROGRESS
    values = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(DataError, match="was written by another version of this package"):
        read_progress(tmp_path, 2)
    with pytest.raises(DataError, match=r"another version.*Set resume=never"):
        newest_sound(tmp_path)


def test_what_is_staged_is_a_copy_in_memory_that_is_used_again():
    staging = Staging()
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "step": torch.tensor(3)}
    first = staging.copy(state)
    state["a"] += 1
    assert first["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and first["a"].is_contiguous() and first["step"] == 3
    place = first["a"].data_ptr()
    again = staging.copy(state)
    assert again["a"].data_ptr() == place and again["a"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert staging.copy({"a": torch.zeros(5, dtype=torch.bfloat16)})["a"].dtype == torch.bfloat16


def test_an_interrupt_while_torch_writes_is_one_though_torch_fails_to_close_its_file():
    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)

    with pytest.raises(RuntimeError, match="inline_container") as caught:
        torch.save({"a": torch.zeros(1000)}, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        _raise_interrupt(caught.value)
    _raise_interrupt(OSError(28, "No space left on device"))  # is none
