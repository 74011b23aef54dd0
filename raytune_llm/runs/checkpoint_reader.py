"""Reads torch's distributed checkpoints from folders that others may write.

A checkpoint's index, `.metadata`, is a pickle, and torch would unpickle anything in it, so its writer could run code here. This
reader creates only the classes that such an index contains. torch itself reads tensors without pickled objects.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from raytune_llm.errors import DataError
from raytune_llm.train.checkpoint_files import METADATA

OF_METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # of Python 3.13
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        (OF_METADATA, "_MEM_FORMAT_ENCODING"),
        *((OF_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((OF_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    }
)
"""(module, name) of the classes that an index may contain, in addition to torch's dtypes."""


class CheckedReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DataError for an index that is damaged or contains other classes."""
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # unpickling damaged bytes can raise anything
            raise DataError(str(path), f"can't be read ({type(error).__name__}: {error})") from None
        if not isinstance(metadata, Metadata):
            raise DataError(str(path), "is no list of a checkpoint's files")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has")
