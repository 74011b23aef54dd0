"""Four bits a weight, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from torch import Tensor, nn

from raytune_llm.config.quantization import NF4, NoQuantization, QuantizationConfig
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models.build import build_policy
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import files_to_read, load_config
from raytune_llm.models.quantization.base import QuantizedLinear
from raytune_llm.models.quantization.nf4 import NF4Linear, pack_experts
from tests.models import lora_section, model_section, packed, some_rows, tiny_llama

CPU = torch.device("cpu")


def stands_for(linear: nn.Linear) -> Tensor:
    """By definition: of each two of a byte the value, the high half first, times the scale of its 64."""
    packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", blocksize=64, compress_statistics=True)
    assert state.state2 is not None
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = state.code[torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()]
    weight = values * scales.repeat_interleave(64)[: linear.weight.numel()]
    return weight.view_as(linear.weight).to(linear.weight.dtype)


def test_experts_whose_rows_are_no_whole_blocks_are_unpacked_exactly() -> None:
    experts, linear = nn.Module(), nn.Linear(96, 128, bias=False)
    experts.register_parameter("down_proj", nn.Parameter(linear.weight.detach().clone().view(2, 64, 96), requires_grad=False))
    pack_experts(experts, "down_proj", "nf4")
    assert torch.equal(experts.down_proj, stands_for(linear).view(2, 64, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (128, 48), (64, 96), (32, 30), (7, 10)])
def test_a_product_and_its_gradient_are_those_of_the_weight_it_stands_for(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    weight, nf4 = stands_for(linear), NF4Linear(linear)
    assert 0 < (weight - linear.weight).norm() / linear.weight.norm() < 0.12
    x = torch.randn(3, 5, inputs, dtype=dtype, requires_grad=True)
    y = nf4(x)
    assert torch.equal(y, x @ weight.T + linear.bias)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, upstream @ weight)


def test_everything_that_it_holds_is_a_number_of_the_weight() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 128).requires_grad_(False)
    first, second = NF4Linear(linear), NF4Linear(linear)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    held = sum(buffer.numel() * buffer.element_size() for buffer in first.buffers() if buffer is not first.code_of_scales)
    assert held == 64 * 128 / 2 + 64 * 128 / 64 + 4 + 4


def policy(folder: Path, quantization: QuantizationConfig, *, in_files: bool = False) -> CausalLM:
    where = {"path": str(folder), "revision": None, "weights": "pretrained", "config": {}, "tokenizer": None}
    model = model_section(**where, trust_remote_code=False, attention="auto")
    lora = lora_section()
    config = load_config(str(folder), {})
    files = files_to_read(config, str(folder)) if in_files else None
    settings = {"compute": torch.float32, "seed": 0, "device": CPU, "files": files}
    return build_policy(config, model, lora, quantization=quantization, **settings)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().base.save_pretrained(tmp_path)
    return tmp_path


def test_a_qlora_step_is_the_lora_step_of_the_weights_it_stands_for(folder: Path) -> None:
    plain, quantized = policy(folder, NoQuantization(name="none")), policy(folder, NF4(name="bnb_nf4"))
    theirs = dict(quantized.named_modules())
    replaced = 0
    torch.manual_seed(1)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(theirs[name], QuantizedLinear):
                module.weight.copy_(stands_for(module))
                replaced += 1
            elif name.endswith("lora_B.default"):
                module.weight.normal_(std=0.05)
                theirs[name].weight.copy_(module.weight)
    assert replaced == 2 * 7
    batch = packed(some_rows([20, 9, 31]))
    losses, gradients = [], []
    for model in (plain, quantized):
        loss = model(batch, cross_entropy).mean()
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert len(gradients[0]) == 2 * 2 * 7
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_base_read_from_its_file_a_layer_at_a_time_is_the_loaded_one(folder: Path) -> None:
    loaded, read = (policy(folder, NF4(name="bnb_nf4"), in_files=in_files) for in_files in (False, True))
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (read, loaded))
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("packed") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(isinstance(module, NF4Linear) for module in read.modules()) == 2 * 7
