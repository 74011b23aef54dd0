"""`export.format=gguf`: one file for llama.cpp, LM Studio and Ollama, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from raytune_llm.config.run import ExportRun
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.export.gguf.families import Family, describe, family_of, rope_factors
from raytune_llm.export.gguf.llama_quantize import in_fewer_bits
from raytune_llm.export.gguf.vocabulary import Vocabulary, vocabulary_of
from raytune_llm.export.in_quantized import is_quantized
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.export.tensors import converted

BLOCK = 32
"""The number of elements that share a scale in Q8_0."""
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class MatrixType:
    """The type in which a file's matrices are stored."""

    quantization: GGMLQuantizationType
    file_type: LlamaFileType


MATRIX_TYPES: Mapping[str, MatrixType] = {
    "fp32": MatrixType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "fp16": MatrixType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": MatrixType(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": MatrixType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""By export.dtype."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    name: str
    source: str | None
    """Its name in the model; None for the rotary factors, which are computed."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.byte_shape))


def gguf(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError for a model that llama.cpp computes differently from transformers."""
    settings = run.export
    got = str(source.folder)
    if source.scores:
        raise ConfigError("export.format", "can't write a GGUF file of a reward model", got=got, fix="Export it as hf.")
    if is_quantized(source.config):
        fix = "Export the model that it was quantized from, or set export.into_quantized=true."
        raise ConfigError("export.format", "can't write a GGUF file of weights that are quantized already", got=got, fix=fix)
    if settings.llama_quantize is not None:
        return in_fewer_bits(_target(source, "auto"), settings.llama_quantize, settings.dtype)
    return _target(source, settings.dtype)


def _target(source: Source, dtype: str) -> Target:
    family = family_of(source.config, str(source.folder))
    dtype = dtype if dtype != "auto" else _dtype_of(source)
    tensors = _tensors(source, family, MATRIX_TYPES[dtype].quantization)
    vocabulary = _vocabulary(source)

    def write(folder: Path, on_bytes: OnBytes) -> None:
        place = folder / f"model-{MATRIX_TYPES[dtype].quantization.name}.gguf"
        _write(place, source, family, vocabulary, tensors, MATRIX_TYPES[dtype].file_type, on_bytes)

    def outputs_of(folder: Path, rows: Rows, device: torch.device) -> Iterator[Tensor]:
        return _outputs(folder, family.read_as(source.config), rows, device)

    return Target(sum(tensor.num_bytes for tensor in tensors), write, outputs_of, "gguf", dtype)


def _dtype_of(source: Source) -> str:
    """The type of the first matrix."""
    stored = next(fact.dtype for fact in source.facts.values() if len(fact.shape) == 2)
    return next(name for name, dtype in DTYPES.items() if dtype is stored)


def _vocabulary(source: Source) -> Vocabulary:
    tokenizer = load_tokenizer(str(source.beside or source.folder), needs_chat_template=False)
    return vocabulary_of(tokenizer, source.vocab_size, source.stop_ids, str(source.folder))


def _tensors(source: Source, family: Family, matrices: GGMLQuantizationType) -> list[Stored]:
    names = get_tensor_name_map(family.architecture, source.config.num_hidden_layers)
    found = []
    if (factors := rope_factors(source.config)) is not None:
        found.append(Stored(ROPE_FACTORS, None, tuple(factors.shape), GGMLQuantizationType.F32))
    for fact in source.outputs(torch.float32):
        if fact.name.endswith("rotary_emb.inv_freq"):
            continue  # only in old files; it is computed from the config
        name = names.get_name(fact.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            fix = "Export it as hf."
            raise ConfigError(
                "export.format",
                f"can't write a GGUF file of this model: llama.cpp has no {fact.name}",
                got=str(source.folder),
                fix=fix,
            )
        if source.ties_head and name == "output.weight":
            continue
        found.append(Stored(name, fact.name, fact.shape, _kind_of(fact.shape, matrices)))
    return found


def _kind_of(shape: tuple[int, ...], matrices: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor, as in llama.cpp's converter: float32 for vectors, and float16 for rows that don't fill blocks."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    in_blocks = matrices is GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if in_blocks and shape[-1] % BLOCK else matrices


def _write(
    path: Path,
    source: Source,
    family: Family,
    vocabulary: Vocabulary,
    tensors: list[Stored],
    file_type: LlamaFileType,
    on_bytes: OnBytes,
) -> None:
    writer = GGUFWriter(path, family.architecture_name)
    try:
        writer.add_type("model")
        writer.add_name(source.name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(2)
        describe(writer, family, source.config)
        vocabulary.write(writer)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.num_bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_bytes_of(tensor, source, family))
            on_bytes(tensor.num_bytes)
    finally:
        writer.close()


def _bytes_of(tensor: Stored, source: Source, family: Family) -> np.ndarray:
    """The tensor's bytes, uint8."""
    if tensor.source is None:
        value = rope_factors(source.config)
        assert value is not None
    else:
        value = family.change(tensor.source, source.tensor(tensor.source, torch.float32), source.config)
    return encoded(tensor.name, value, tensor.kind).reshape((*tensor.shape[:-1], -1)).view(np.uint8)


def encoded(name: str, value: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The float32 tensor in the file's type. Raises ConfigError if float16 can't represent a value."""
    if kind is GGMLQuantizationType.F16:
        converted(name, value, torch.float16)
    return quantize(value.contiguous().numpy(), kind)


@torch.no_grad()
def _outputs(folder: Path, config: Any, rows: Rows, device: torch.device) -> Iterator[Tensor]:
    """The outputs of the folder's GGUF file, whose weights transformers reads, with the model's own config."""
    transformers.logging.disable_progress_bar()
    (file,) = folder.glob("*.gguf")
    dense = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, config=config, dtype=torch.float32, quantization_config=dense
    )
    model.eval().to(device)
    for ids in rows.ids:
        yield model(torch.from_numpy(ids.astype(np.int64))[None].to(device)).logits[0, :-1].log_softmax(-1).cpu()
