"""Checkpoints in few bits as quantizers write them, made by hand from drawn numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_llm.data.tokens.tokenizer import byte_tokenizer

GROUP = 32
SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
Packed = tuple[dict[str, Tensor], Tensor]
"""What the files have of a weight, and the weight that it stands for."""


def words(numbers: list[int], bits: int) -> list[int]:
    """One long number of which each has `bits` bits, the first the lowest, cut into words of 32."""
    whole = sum(number << bits * place for place, number in enumerate(numbers))
    cut = [whole >> 32 * word & 0xFFFFFFFF for word in range(len(numbers) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


def in_words(numbers_XY: Tensor, bits: int) -> Tensor:
    """Each row by itself."""
    return torch.tensor([words(row, bits) for row in numbers_XY.tolist()], dtype=torch.int32)


def drawn(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N, K], and zeros and scales [N, G], all random: what they stand for has the weight's shape alone."""
    N, K = weight.shape
    numbers, zeros = torch.randint(0, 2**bits, (N, K)), torch.randint(0, 2**bits, (N, K // GROUP))
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    return numbers, zeros, (0.01 + 0.02 * torch.rand(N, K // GROUP)).half()


def gptq(bits: int, layout: str = "gptq", *, symmetric: bool = False, desc_act: bool = False) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        numbers, zeros, scales = drawn(weight, bits, symmetric=symmetric)
        K = weight.shape[1]
        groups = torch.arange(K) // GROUP
        groups = groups[torch.randperm(K)] if desc_act else groups
        stands_for = torch.stack([scales[:, g].float() * (numbers[:, k] - zeros[:, g]) for k, g in enumerate(groups.tolist())], 1)
        held = (zeros - 1) % 2**bits if layout == "gptq" else zeros
        parts = {
            "qweight": in_words(numbers, bits).T,
            "qzeros": in_words(held.T, bits),
            "scales": scales.T,
            "g_idx": groups.int(),
        }
        return parts, stands_for

    return pack


def awq(weight: Tensor) -> Packed:
    numbers, zeros, scales = drawn(weight, 4, symmetric=False)
    order = [8 * word + place for word in range(len(weight) // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    parts = {"qweight": in_words(numbers.T[:, order], 4), "qzeros": in_words(zeros.T[:, order], 4), "scales": scales.T}
    return parts, (numbers - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)


def aqlm(weight: Tensor) -> Packed:
    (N, K), books, entries, inputs = weight.shape, 2, 256, 8
    codes = torch.randint(0, entries, (N, K // inputs, books))
    codebooks, scales = torch.randn(books, entries, 1, inputs).half(), (0.01 + torch.rand(N, 1, 1, 1)).half()
    vectors = sum(codebooks[book].float()[codes[..., book], 0] for book in range(books))
    parts = {"codes": codes.to(torch.uint8).view(torch.int8), "codebooks": codebooks, "scales": scales}
    return parts, (vectors * scales.float().view(N, 1, 1)).view(N, K)


def hqq(weight: Tensor) -> Packed:
    """As its layers save themselves."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.clone()
    section = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    layer = HQQLinear(linear, section, compute_dtype=torch.float32, device="cpu")
    parts = {name: part.clone() for name, part in layer.state_dict().items()}
    return parts, layer.dequantize().detach().clone().float()


def int8(weight: Tensor) -> Packed:
    """bitsandbytes' rows with their largest values."""
    largest = weight.abs().amax(1)
    numbers = (127 * weight / largest[:, None]).round().to(torch.int8)
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, numbers * (largest / 127)[:, None]


def saved(folder: Path, family: str = "llama", **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **sizes}), dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def replaced(folder: Path, pack: Callable[[Tensor], Packed], **quantization: Any) -> dict[str, Tensor]:
    """The linear layers of the folder's model in a format. Returns what they stand for, by the names of the files."""
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        parts, expected[name] = pack(weights.pop(name))
        weights |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, **quantization)
    return expected


def say(folder: Path, **quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
