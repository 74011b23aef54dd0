"""A base's files as an export reads them: what is damaged in them is named before anything is written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from raytune_llm.errors import DataError
from raytune_llm.export.tensors import TensorFiles


def written(file: Path, entry: dict[str, Any]) -> dict[str, str]:
    header = json.dumps({"__metadata__": {"format": "pt"}, "one": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return {"one": str(file)}


def test_a_tensor_is_read_by_its_name(tmp_path):
    files = written(tmp_path / "a.safetensors", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})
    assert TensorFiles(files).read("one").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "holds one as F4"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "is damaged: one has 8 bytes"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "is cut off: it ends within one"),
        ({"dtype": "F32", "shape": [2]}, "is not a readable safetensors file"),
        ([1], "is not a readable safetensors file"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_named(tmp_path, entry, said):
    with pytest.raises(DataError, match=rf"a\.safetensors: {said}"):
        TensorFiles(written(tmp_path / "a.safetensors", entry))
