"""A state that is divided among several files, which are hashed while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from raytune_llm.file_hash import sha256_of
from raytune_llm.train import checkpoint_writer
from raytune_llm.train.checkpoint_writer import HashedFiles, StateWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {f"weight{number}": torch.arange(100.0 * (number + 1)) for number in range(9)}


def written(folder: Path) -> StateWriter:
    writer = StateWriter(folder)
    dcp.save(dict(STATE), storage_writer=writer, no_dist=True)
    return writer


@pytest.mark.parametrize("piece_bytes", [2**26, 100])
@pytest.mark.parametrize(("part_bytes", "files"), [(2**28, 1), (8_000, 2), (100, 4)])
def test_a_state_is_read_back_whole_from_one_file_or_several(tmp_path, monkeypatch, part_bytes, files, piece_bytes):
    monkeypatch.setattr(checkpoint_writer, "PART_BYTES", part_bytes)
    monkeypatch.setattr(checkpoint_writer, "PIECE_BYTES", piece_bytes)
    writer = written(tmp_path)
    data = sorted(tmp_path.glob("__0_*.distcp"))
    assert len(data) == files and max(file.stat().st_size for file in data) < 2 * min(file.stat().st_size for file in data)
    assert writer.hashes == {file.name: sha256_of(file) for file in tmp_path.iterdir()}
    read = {name: torch.empty_like(value) for name, value in STATE.items()}
    dcp.load(read, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(read[name], value) for name, value in STATE.items())


def test_a_file_of_several_that_can_t_be_written_fails_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "PART_BYTES", 100)
    create_stream = HashedFiles.create_stream

    def failing(self: HashedFiles, path: Any, mode: str) -> Any:
        if Path(path).name.startswith("__0_2"):
            raise OSError(28, "No space left on device")
        return create_stream(self, path, mode)

    monkeypatch.setattr(HashedFiles, "create_stream", failing)
    with pytest.raises(CheckpointException, match="No space left"):
        written(tmp_path)
