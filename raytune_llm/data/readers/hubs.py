"""Loads data sets of hubs by their id."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from raytune_llm.data.readers.chunks import MAX_CHUNKS, Chunk, NumberedRow, Source
from raytune_llm.data.readers.tables import unpadded
from raytune_llm.errors import DataError, ResourceError
from raytune_llm.hub import ask_hub

CHUNK_BYTES = 16 << 20


def _huggingface_rows(name: str, part: Source | Chunk) -> Any:
    """The whole data set that the part belongs to."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    address, state = ask_hub()
    if state == "not reached":
        raise DataError(
            name,
            f"there is no such file or folder, and no hub answers at {address}",
            "Check its name, or set HF_ENDPOINT to a hub that this machine reaches; with HF_HUB_OFFLINE=1 only what is "
            "cached is used.",
        )
    try:
        return load_dataset(name, part.subset, split=part.split, data_dir=part.folder)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if reason.startswith("Unknown split"):
            raise DataError(
                name, f"has no such split ({reason})", "Correct data.split, or data.eval_split if its rows are held out."
            ) from None
        raise DataError(
            name,
            f"there is no such file or folder, and the hub gives no data set of that name ({reason})",
            "Check its name, subset and split, and that the hub is reached (HF_ENDPOINT, HF_TOKEN).",
        ) from None


def _modelscope_rows(name: str, part: Source | Chunk) -> Any:
    """The whole data set that the part belongs to, as `datasets` has it."""
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise ResourceError(
            f"data.hub=modelscope needs the package modelscope ({error})", "pip install 'raytune-llm[modelscope]'."
        ) from None
    try:
        rows = MsDataset.load(name, subset_name=part.subset, split=part.split, data_dir=part.folder)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise DataError(
            name,
            f"there is no such file or folder, and ModelScope gives no data set of that name ({reason})",
            "Check its name, subset and split, and that the hub is reached (MODELSCOPE_API_TOKEN for private ones).",
        ) from None
    return rows.to_hf_dataset() if isinstance(rows, MsDataset) else rows


HUBS = {"huggingface": _huggingface_rows, "modelscope": _modelscope_rows}


def fingerprint(source: Source) -> str:
    """The fingerprint of `datasets`, which identifies the rows: revision, subset and split."""
    return HUBS[source.hub](source.files[0], source)._fingerprint


def plan_hub(source: Source, file: str, chunk_bytes: int) -> Iterator[Chunk]:
    rows = HUBS[source.hub](file, source)
    chunk_bytes = max(CHUNK_BYTES, rows.data.nbytes // MAX_CHUNKS)
    rows_per_chunk = max(1, len(rows) * chunk_bytes // max(rows.data.nbytes, 1))
    for start in range(0, len(rows), rows_per_chunk):
        end = min(start + rows_per_chunk, len(rows))
        chunk = Chunk(source.kind, file, start, end, start + 1, end - start)
        yield replace(chunk, subset=source.subset, split=source.split, folder=source.folder, hub=source.hub)


def read_hub(chunk: Chunk, wanted: Collection[str] | None) -> Iterator[NumberedRow]:
    rows = HUBS[chunk.hub](chunk.file, chunk)
    empty = dict.fromkeys(rows.column_names)
    if wanted is not None:
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    for number in range(chunk.start, chunk.end):
        row = rows[number] if rows.column_names else {}
        yield number + 1, {**empty, **{name: unpadded(value) for name, value in row.items()}}
