"""`export.format=gguf_lora`: a LoRA adapter as a GGUF file of its own, which llama.cpp puts on a GGUF of the base
(`llama-server --model base.gguf --lora adapter-F32.gguf`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys, get_tensor_name_map
from gguf.quants import dequantize, quantize
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.run import ExportRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.check import outputs
from raytune_llm.export.gguf.families import Family, family_of
from raytune_llm.export.gguf.file import KINDS
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.models.adapters.bank_weights import PREFIX, A, B, more_than_lora, scale_of, write
from raytune_llm.models.adapters.saved import WEIGHTS, read_config

FILE_A, FILE_B = ".weight.lora_a", ".weight.lora_b"


@dataclass(frozen=True)
class Pair:
    """A layer's A and B, by its name in the model and in the file."""

    layer: str
    name: str
    a_RK: Tensor
    b_OR: Tensor
    scale: float
    """Of B A in the layer."""

    @property
    def rank(self) -> int:
        return len(self.a_RK)


def gguf_lora(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError for an adapter that is more than LoRA of linear layers, and for a base that llama.cpp would compute
    otherwise than transformers does."""
    dtype = run.export.dtype if run.export.dtype != "auto" else "fp32"
    if dtype not in DTYPES:
        rule = f"must be auto or one of {', '.join(DTYPES)} with export.format=gguf_lora"
        raise ConfigError("export.dtype", rule, got=dtype, fix="auto is fp32.")
    family, kind = family_of(source.config, str(source.folder)), KINDS[dtype].quantization
    pairs = _pairs(source, family)
    place = f"adapter-{kind.name}.gguf"

    def write_file(folder: Path, on_bytes: OnBytes) -> None:
        _write(folder / place, source, family, pairs, kind, on_bytes)

    def outputs_of(folder: Path, rows: Rows) -> Iterator[Tensor]:
        return _outputs(folder / place, source, family, pairs, rows)

    num_bytes = sum(pair.a_RK.numel() + pair.b_OR.numel() for pair in pairs) * DTYPES[dtype].itemsize
    return Target(num_bytes, write_file, outputs_of, "gguf", dtype, merges=False)


def _pairs(source: Source, family: Family) -> list[Pair]:
    if len(source.adapters) != 1:
        rule = f"must be one adapter with export.format=gguf_lora, and there are {len(source.adapters)}"
        raise ConfigError("export.adapters", rule, fix="Set export.format=gguf, which merges what there is.")
    adapter, factor = source.adapters[0]
    config = read_config(adapter.folder, adapter.setting)
    what = "a reward model's" if adapter.scores else more_than_lora(config)
    if what is not None:
        rule = f"must be plain LoRA with export.format=gguf_lora, and is {what}"
        raise ConfigError(adapter.setting, rule, got=adapter.folder, fix="Set export.format=gguf or hf, which merge it.")
    assert isinstance(config, LoraConfig)
    names = get_tensor_name_map(family.architecture, source.config.num_hidden_layers)
    tensors, pairs = load_file(Path(adapter.folder) / WEIGHTS[0]), []
    for layer in sorted(adapter.layers):
        a_RK, b_OR = tensors.get(PREFIX + layer + A), tensors.get(PREFIX + layer + B)
        name = names.get_name(layer)
        tied = source.ties_head and name == "output"
        if a_RK is None or b_OR is None or name is None or tied:
            why = "an embedding" if a_RK is None or b_OR is None or tied else "no tensor of llama.cpp's"
            rule = f"must be on linear layers with export.format=gguf_lora: {layer} is {why}"
            raise ConfigError(adapter.setting, rule, got=adapter.folder, fix="Set export.format=gguf, which merges it.")
        b_OR = family.change(f"{layer}.weight", b_OR.float(), source.config)
        pairs.append(Pair(layer, name, a_RK.float(), b_OR, factor * scale_of(config, layer, len(a_RK))))
    return pairs


def _write(
    path: Path, source: Source, family: Family, pairs: Sequence[Pair], kind: GGMLQuantizationType, on_bytes: OnBytes
) -> None:
    # llama.cpp scales by alpha / rank, with one alpha for all layers; without one, by 1.
    alphas = {pair.scale * pair.rank for pair in pairs}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    writer = GGUFWriter(path, family.architecture_name)
    try:
        writer.add_type("adapter")
        writer.add_name(source.adapters[0][0].folder if source.run is None else source.name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for pair in pairs:
            b_OR = pair.b_OR if alpha else pair.b_OR * pair.scale
            for name, value in ((pair.name + FILE_A, pair.a_RK), (pair.name + FILE_B, b_OR)):
                if kind is GGMLQuantizationType.F16 and value.abs().max() > torch.finfo(torch.float16).max:
                    rule = f"can't be float16 for {name}, whose values are too large"
                    raise ConfigError("export.dtype", rule, got="fp16", fix="Set bf16 or fp32.")
                data = quantize(value.contiguous().numpy(), kind)
                writer.add_tensor(name, data, raw_dtype=kind)
                on_bytes(data.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _outputs(file: Path, source: Source, family: Family, pairs: Sequence[Pair], rows: Rows) -> Iterator[Tensor]:
    """Of the adapter in the file, put back into PEFT's form."""
    reader = GGUFReader(file)
    found = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors}
    alpha = float(reader.fields[Keys.Adapter.LORA_ALPHA].contents())
    back: dict[str, tuple[Tensor, Tensor]] = {}
    for pair in pairs:
        b_OR = found[pair.name + FILE_B] * (alpha / pair.rank if alpha else 1.0)
        order_O = family.change(f"{pair.layer}.weight", torch.arange(len(b_OR))[:, None], source.config).flatten().long()
        back[pair.layer] = found[pair.name + FILE_A], torch.empty_like(b_OR).index_copy_(0, order_O, b_OR)
    with TemporaryDirectory() as folder:
        ranks = {pair.layer: pair.rank for pair in pairs}
        config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, task_type="CAUSAL_LM")
        write(Path(folder), config, back, base_model=None)
        base = replace(source.model, path=str(source.folder), revision=None)
        yield from outputs(base, SavedAdapter(path=folder, setting="export.format"), rows, scores=False)
