"""`export.format=gguf_lora`: a LoRA adapter as a separate GGUF file, which llama.cpp applies to a GGUF file of the base
(`llama-server --model base.gguf --lora adapter-F32.gguf`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys, get_tensor_name_map
from gguf.quants import dequantize
from torch import Tensor

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.check import outputs
from raytune_llm.export.gguf.families import Family, family_of
from raytune_llm.export.gguf.file import MATRIX_TYPES, encoded
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.models.adapters.pairs import Pair, read, write

FILE_A, FILE_B = ".weight.lora_a", ".weight.lora_b"


@dataclass(frozen=True)
class Stored:
    """A layer's A and B in the file. B's rows are in llama.cpp's order."""

    layer: str
    """Its name in the model."""
    name: str
    """In the file."""
    pair: Pair


def gguf_lora(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError for an adapter that is more than LoRA on linear layers, and for a base that llama.cpp computes
    differently from transformers."""
    dtype = run.export.dtype if run.export.dtype != "auto" else "fp32"
    if dtype not in DTYPES:
        rule = f"must be auto or one of {', '.join(DTYPES)} with export.format=gguf_lora"
        raise ConfigError("export.dtype", rule, got=dtype, fix="auto is fp32.")
    family, kind = family_of(source.config, str(source.folder)), MATRIX_TYPES[dtype].quantization
    layers = _stored(source, family)
    place = f"adapter-{kind.name}.gguf"

    def write_file(folder: Path, on_bytes: OnBytes) -> None:
        _write(folder / place, source, family, layers, kind, on_bytes)

    def outputs_of(folder: Path, rows: Rows, device: torch.device) -> Iterator[Tensor]:
        return _outputs(folder / place, source, family, layers, rows, device)

    num_bytes = sum(layer.pair.a_RK.numel() + layer.pair.b_OR.numel() for layer in layers) * DTYPES[dtype].itemsize
    return Target(num_bytes, write_file, outputs_of, "gguf", dtype, merges=False)


def _stored(source: Source, family: Family) -> list[Stored]:
    fix = "Set export.format=gguf, which merges it."
    if len(source.adapters) != 1:
        rule = f"must be one adapter with export.format=gguf_lora, and there are {len(source.adapters)}"
        raise ConfigError("export.adapters", rule, fix="Set export.format=gguf, which merges what there is.")
    adapter, factor = source.adapters[0]
    if source.under:
        rule = "must be empty with export.format=gguf_lora: the adapter is for the base with these in it"
        raise ConfigError("model.merged_adapters", rule, got=source.model.merged_adapters, fix=fix)
    if adapter.scores:
        rule = "must be a language model's with export.format=gguf_lora, and is a reward model's"
        raise ConfigError(adapter.setting, rule, got=adapter.folder, fix="Set export.format=hf, which merges it.")
    names = get_tensor_name_map(family.architecture, source.config.num_hidden_layers)
    found = []
    for layer, pair in read(adapter.folder, adapter.setting, fix=fix).items():
        name = names.get_name(layer)
        if name is None or (source.ties_head and name == "output"):
            rule = f"must be on layers that llama.cpp's files of the base have, with export.format=gguf_lora: {layer} is not one"
            raise ConfigError(adapter.setting, rule, got=adapter.folder, fix=fix)
        b_OR = family.change(f"{layer}.weight", pair.b_OR, source.config)
        found.append(Stored(layer, name, Pair(pair.a_RK, b_OR, factor * pair.scale)))
    return found


def _write(
    path: Path, source: Source, family: Family, layers: Sequence[Stored], kind: GGMLQuantizationType, on_bytes: OnBytes
) -> None:
    # llama.cpp scales by alpha / rank, with one alpha for all layers; without one, by 1.
    alphas = {layer.pair.scale * layer.pair.rank for layer in layers}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    writer = GGUFWriter(path, family.architecture_name)
    try:
        writer.add_type("adapter")
        writer.add_name(source.adapters[0][0].folder if source.run is None else source.name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for layer in layers:
            b_OR = layer.pair.b_OR if alpha else layer.pair.b_OR * layer.pair.scale
            for name, value in ((layer.name + FILE_A, layer.pair.a_RK), (layer.name + FILE_B, b_OR)):
                data = encoded(name, value, kind)
                writer.add_tensor(name, data, raw_dtype=kind)
                on_bytes(data.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _outputs(
    file: Path, source: Source, family: Family, layers: Sequence[Stored], rows: Rows, device: torch.device
) -> Iterator[Tensor]:
    """The outputs with the adapter in the file, converted back to PEFT's format."""
    reader = GGUFReader(file)
    found = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors}
    alpha = float(reader.fields[Keys.Adapter.LORA_ALPHA].contents())
    back: dict[str, Pair] = {}
    for layer in layers:
        b_OR = found[layer.name + FILE_B]
        order_O = family.change(f"{layer.layer}.weight", torch.arange(len(b_OR))[:, None], source.config).flatten().long()
        ours_OR = torch.empty_like(b_OR).index_copy_(0, order_O, b_OR)
        back[layer.layer] = Pair(found[layer.name + FILE_A], ours_OR, alpha / layer.pair.rank if alpha else 1.0)
    with TemporaryDirectory() as folder:
        write(Path(folder), back)
        base = replace(source.model, path=str(source.folder), revision=None)
        yield from outputs(base, SavedAdapter(path=folder, setting="export.format"), rows, device, scores=False)
