"""Reading and writing a model's safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raytune_llm.errors import ConfigError, DataError
from raytune_llm.models.finite import all_finite
from raytune_llm.models.stored import INDEX, WHOLE

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""torch's dtype -> its name in safetensors files."""
AHEAD = 2
"""Tensors that are made while one is written."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A tensor's name, dtype and shape, known before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype. Raises ConfigError if a finite value becomes infinite."""
    made = tensor.to(dtype)
    if made is not tensor and made.is_floating_point() and not all_finite(made) and all_finite(tensor):
        rule = f"can't hold {name}, whose values are too large"
        raise ConfigError("export.dtype", rule, got=dtype, fix="Set bf16 or fp32.")
    return made


class Tensors(Protocol):
    """A model's tensors, read one by one."""

    @property
    def facts(self) -> Mapping[str, TensorFact]: ...

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own that the caller may change."""
        ...


class TensorFiles:
    """Tensors in safetensors files. Files are not mapped, so that only the tensor being read is in memory."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """files: tensor's name -> its file. Raises DataError for an incomplete file."""
        self.facts: dict[str, TensorFact] = {}
        """In the order of the files and of the tensors in them."""
        self._places: dict[str, tuple[str, int]] = {}
        for path in dict.fromkeys(files.values()):
            header, start = _header(path)
            size = os.path.getsize(path)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                if start + end > size:
                    raise DataError(path, f"is cut off: it ends within {name}", "Copy or download it again.")
                if (dtype := DTYPES.get(entry["dtype"])) is None:
                    problem = f"holds {name} as {entry['dtype']}; {', '.join(DTYPES)} can be read"
                    raise DataError(path, problem, "Name the model that it was made of.")
                self.facts[name] = TensorFact(name, tuple(entry["shape"]), dtype)
                self._places[name] = (path, start + begin)
                if self.facts[name].num_bytes != end - begin:
                    raise DataError(path, f"is damaged: {name} has {end - begin} bytes", "Copy or download it again.")

    def read(self, name: str) -> Tensor:
        path, start = self._places[name]
        fact = self.facts[name]
        tensor = torch.empty(fact.shape, dtype=fact.dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            left = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
            while left and (got := file.readinto(left)):
                left = left[got:]
        if left:
            raise DataError(path, f"is cut off: it ends within {name}", "Copy or download it again.")
        return tensor


def _header(path: str) -> tuple[dict[str, Any], int]:
    """The entries of the file's header, and the offset of the first tensor."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if not all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in header.values()):
            raise ValueError("a tensor without a place")
        return header, 8 + length
    except (OSError, AttributeError, struct.error, ValueError, MemoryError, OverflowError, RecursionError) as error:
        problem = f"is not a readable safetensors file ({type(error).__name__})"
        raise DataError(path, problem, "Copy or download it again.") from None


@dataclass(frozen=True, slots=True)
class Shard:
    """The tensors of one file."""

    name: str
    facts: Sequence[TensorFact]

    @property
    def num_bytes(self) -> int:
        return sum(fact.num_bytes for fact in self.facts)


def shards_of(facts: Sequence[TensorFact], shard_bytes: int) -> list[Shard]:
    """The files for these tensors, in order. Each has at most shard_bytes bytes, or a single tensor; names are transformers'."""
    shards: list[list[TensorFact]] = [[]]
    size = 0
    for fact in facts:
        if shards[-1] and size + fact.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(fact)
        size += fact.num_bytes
    if len(shards) == 1:
        return [Shard(WHOLE, shards[0])]
    return [Shard(f"model-{n + 1:05}-of-{len(shards):05}.safetensors", shard) for n, shard in enumerate(shards)]


def write(
    folder: Path, facts: Sequence[TensorFact], shard_bytes: int, make: Callable[[str], Tensor], on_tensor: Callable[[int], None]
) -> None:
    """Write files with transformers' names, and an index if there are several. make: returns the tensor of a name, with the shape
    and dtype of its fact. on_tensor: called with the size in bytes of each written tensor."""
    shards = shards_of(facts, shard_bytes)
    for shard in shards:
        write_file(folder / shard.name, shard.facts, make, on_tensor)
    write_index(folder, shards)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index, tensor -> file, if there are several files."""
    if len(shards) > 1:
        weight_map = {fact.name: shard.name for shard in shards for fact in shard.facts}
        index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: Path, facts: Sequence[TensorFact], make: Callable[[str], Tensor], on_tensor: Callable[[int], None]) -> None:
    """Write a safetensors file tensor by tensor, since the library's writer needs all tensors in memory. The format: the length
    of the header, a JSON header with each tensor's dtype, shape and offsets, and the tensors' bytes."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **dict(_entries(facts))}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for fact, tensor in _made_ahead(facts, make):
            assert tuple(tensor.shape) == fact.shape and tensor.dtype == fact.dtype, fact
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            on_tensor(fact.num_bytes)


def _made_ahead(facts: Sequence[TensorFact], make: Callable[[str], Tensor]) -> Iterator[tuple[TensorFact, Tensor]]:
    """The tensors, in order. While one is written, threads read and merge the next: one reads while another merges."""
    with ThreadPoolExecutor(AHEAD) as threads:
        coming: deque[tuple[TensorFact, Future[Tensor]]] = deque()
        for fact in facts:
            coming.append((fact, threads.submit(make, fact.name)))
            if len(coming) > AHEAD:
                made, future = coming.popleft()
                yield made, future.result()
        for made, future in coming:
            yield made, future.result()


def _entries(facts: Sequence[TensorFact]) -> Iterator[tuple[str, dict[str, object]]]:
    at = 0
    for fact in facts:
        end = at + fact.num_bytes
        yield fact.name, {"dtype": NAMES[fact.dtype], "shape": list(fact.shape), "data_offsets": [at, end]}
        at = end
