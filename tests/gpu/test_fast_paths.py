"""On a GPU, every fast path gives what the plain one gives in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.config.run import TrainRun
from raytune_llm.data.batches import collate
from raytune_llm.errors import ResourceError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import gated
from raytune_llm.models.attention import Case
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.models.load import load_model
from raytune_llm.models.quantization import QuantizedLinear, quantize
from raytune_llm.models.quantization.fp8 import FP8Linear
from raytune_llm.models.quantization.nf4 import NF4Linear
from raytune_llm.records import Batch, Prefixes
from raytune_llm.report.metrics import TABLE
from raytune_llm.runs.build import Builder
from raytune_llm.train.loop import to_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
MODEL = (
    "{model_type:llama,vocab_size:512,hidden_size:256,intermediate_size:512,num_hidden_layers:3,num_attention_heads:4,"
    "num_key_value_heads:2,max_position_embeddings:1024,tie_word_embeddings:false}"
)
MIXTURE = (
    "{model_type:qwen3_moe,vocab_size:512,hidden_size:256,intermediate_size:512,moe_intermediate_size:128,num_hidden_layers:3,"
    "num_attention_heads:4,num_key_value_heads:2,num_experts:4,num_experts_per_tok:2,max_position_embeddings:1024,"
    "tie_word_embeddings:false}"
)


def batch(*lengths: int, rows: int = 2, length: int = 512) -> Batch:
    random = np.random.default_rng(sum(lengths))
    lines = [[(random.integers(0, 512, n), np.array([n // 3, n])) for n in lengths] for _ in range(rows)]
    return to_device(collate(lines, length=length, pad_id=0), CUDA)


def policy(*overrides: str) -> CausalLM:
    base = [
        "model=hub",
        "model.path=null",
        "model.weights=random",
        "model.tokenizer=bytes",
        f"++model.config={MODEL}",
        "data.path=none",
        "resources=inline",
        "train.seed=0",
    ]
    run = load_config("train", [*base, *overrides])
    return Builder(run, load_model_config(None, run.model.config), CUDA).build().policy.train()


def same_weights(model: CausalLM, other: CausalLM) -> None:
    """Both get the weights of the second as bf16 has them, and B matrices that are not zero."""
    torch.manual_seed(1)
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = (torch.randn_like(parameter) * 0.05 if "lora_B" in name else parameter).bfloat16().float()
            parameter.copy_(value)
            theirs[name].copy_(value)


def loss_and_gradients(model: CausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(batch, cross_entropy)
    loss.sum().div(len(batch.trained_N)).backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().float(), **gradients}


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.compile=false"],
        ["train.compile=false", "train.activation_checkpointing=full"],
        ["train.compile=true"],
        ["train.compile=true", "train.activation_checkpointing=selective"],
        ["train.compile=true", "train.activation_checkpointing=full"],
        ["train.compile=true", "train.activation_checkpointing=offload"],
    ],
    ids=" ".join,
)
def test_a_bf16_step_is_as_near_to_float32_as_plain_bf16_is(adapter: str, overrides: list[str]) -> None:
    torch._dynamo.reset()
    plain = policy(f"adapter={adapter}", "train.precision=fp32", "train.compile=false", "model.attention=sdpa")
    fast = policy(f"adapter={adapter}", "train.precision=bf16", *overrides)
    same_weights(plain, fast)
    packs = batch(200, 31, 7, 120)
    wanted, got = loss_and_gradients(plain, packs), loss_and_gradients(fast, packs)
    assert wanted.keys() == got.keys()
    assert error(got["loss"], wanted["loss"]) < 3e-3
    for name in wanted:
        assert error(got[name], wanted[name]) < 2.5e-2, name


@pytest.mark.parametrize(
    ("quantization", "bound"), [("fp8", 0.25), ("bnb_nf4", 2.5e-2), ("bnb_fp4", 2.5e-2), ("bnb_int8", 2.5e-2)]
)
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_quantized_step_is_that_of_the_weights_it_stands_for(quantization: str, bound: float, compiled: str) -> None:
    """FP8 rounds activations and gradients too, some twenty times one after another."""
    same_step_as_unpacked(MODEL, bound, f"train.compile={compiled}", f"quantization={quantization}")


@pytest.mark.parametrize(("quantization", "bound"), [("fp8", 0.25), ("bnb_nf4", 5e-2), ("bnb_int8", 5e-2)])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_step_over_quantized_experts_is_that_of_the_weights_they_stand_for(
    quantization: str, bound: float, compiled: str
) -> None:
    same_step_as_unpacked(MIXTURE, bound, f"train.compile={compiled}", f"quantization={quantization}")


def same_step_as_unpacked(model: str, bound: float, *overrides: str) -> None:
    torch._dynamo.reset()
    settings = [f"++model.config={model}", "adapter=lora", "train.precision=bf16"]
    plain, fast = policy(*settings), policy(*settings, *overrides)
    torch.manual_seed(1)
    theirs = dict(fast.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(theirs.get(name), QuantizedLinear):
                identity = torch.eye(module.out_features, device=CUDA, dtype=torch.bfloat16)
                module.weight.copy_(theirs[name].transposed(identity, *theirs[name].weights()))
            elif parametrize.is_parametrized(theirs.get(name, module)):  # experts
                for held in theirs[name].parametrizations:
                    module.get_parameter(held).copy_(getattr(theirs[name], held))
            elif name.endswith("lora_B.default"):
                module.weight.normal_(std=0.05)
    fast.load_state_dict({name: p for name, p in plain.named_parameters() if p.requires_grad}, strict=False)
    packs = batch(200, 31, 7, 120)
    wanted, got = loss_and_gradients(plain, packs), loss_and_gradients(fast, packs)
    assert wanted.keys() == got.keys()
    assert error(got["loss"], wanted["loss"]) < 0.02
    for name in wanted:
        assert error(got[name], wanted[name]) < bound, name


@pytest.mark.parametrize("quantization", ["fp8", "bnb_nf4", "bnb_fp4", "bnb_int8"])
def test_a_base_read_from_its_file_a_layer_at_a_time_is_the_loaded_one(quantization: str, tmp_path: Path) -> None:
    folder, settings = str(tmp_path), {"weights": "pretrained", "dtype": torch.bfloat16, "seed": 0}
    policy("adapter=none").base.save_pretrained(folder)
    overrides = ["model.weights=pretrained", f"model.path={folder}", "adapter=lora", f"quantization={quantization}"]
    read = policy(*overrides)
    loaded = load_model(load_model_config(folder, {}), folder, device=CUDA, **settings)
    section = load_config("train", [*overrides, "data.path=none"]).quantization
    quantize(layers(loaded.requires_grad_(False)), section, CUDA)
    ours = {name.replace(".base_layer", ""): x for name, x in (*read.base.named_parameters(), *read.base.named_buffers())}
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert torch.equal(ours[name].float(), tensor.float()), name


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_step_that_trains_with_fp8_products_is_near_one_with_wide_ones(compiled: str) -> None:
    torch._dynamo.reset()
    settings = ["adapter=none", "train.precision=bf16", f"train.compile={compiled}"]
    plain, fast = policy(*settings), policy(*settings, "quantization=fp8")
    fast.load_state_dict(plain.state_dict())
    packs = batch(200, 31, 7, 120)
    wanted, got = loss_and_gradients(plain, packs), loss_and_gradients(fast, packs)
    assert wanted.keys() == got.keys()
    assert error(got["loss"], wanted["loss"]) < 0.02
    for name in wanted:
        assert error(got[name], wanted[name]) < 0.25, name


def test_an_fp8_product_is_as_near_as_three_bits_of_mantissa_allow() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256, bias=False, device=CUDA, dtype=torch.bfloat16)
    x, grad = torch.randn(64, 512, device=CUDA).bfloat16(), torch.randn(64, 256, device=CUDA).bfloat16()
    fp8 = FP8Linear(linear)
    assert error(fp8.product(x, *fp8.weights()).float(), x.float() @ linear.weight.float().T) < 0.045
    assert error(fp8.transposed(grad, *fp8.weights()).float(), grad.float() @ linear.weight.float()) < 0.045


def test_an_nf4_product_is_that_of_the_weight_it_stands_for() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256, bias=False, device=CUDA, dtype=torch.bfloat16)
    nf4 = NF4Linear(linear)
    stands_for = nf4.transposed(torch.eye(256, device=CUDA, dtype=torch.bfloat16), *nf4.weights()).float()
    assert error(stands_for, linear.weight.float()) < 0.12
    x = torch.randn(64, 512, device=CUDA).bfloat16()
    assert error(nf4.product(x, *nf4.weights()).float(), x.float() @ stands_for.T) < 5e-3


@pytest.fixture(params=["varlen", "flash2", "flash3", "flash4"])
def flash(request: pytest.FixtureRequest) -> Iterator[str]:
    """FlashAttention of torch or of a package, that torch has been told to take where it is one that torch takes."""
    capability = torch.cuda.get_device_capability()
    lacking = attention.LACKS[request.param](Case(device_type="cuda", dtype=torch.bfloat16, capability=capability, head=64))
    if lacking is not None:
        pytest.skip(lacking)
    attention.tell_torch(request.param)
    yield request.param
    attention.tell_torch("varlen")


def is_masked_attention(backend: str, lengths: tuple[int, ...], **settings: Any) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 512, 64, device=CUDA).bfloat16().requires_grad_() for heads in (8, 2, 2))
    bounds = torch.tensor([0, *lengths], device=CUDA).cumsum(0).int()
    settings = {"cu_seqlens_S": bounds, "max_seqlen": max(lengths), "scaling": 0.1} | settings
    got, _ = attention.BACKENDS[backend](torch.nn.Identity(), query, key, value, None, **settings)
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted, _ = attention.sdpa(torch.nn.Identity(), *wide, None, **settings)
    assert error(got.float(), wanted) < 1e-2
    upstream = torch.randn_like(wanted)
    ours = torch.autograd.grad(got, [query, key, value], upstream.bfloat16())
    for mine, plain in zip(ours, torch.autograd.grad(wanted, wide, upstream), strict=True):
        assert error(mine.float(), plain) < 2e-2


@pytest.mark.parametrize("lengths", [(512,), (300, 100, 1, 111)], ids=["one document", "four documents"])
def test_flash_attention_is_masked_attention(flash: str, lengths: tuple[int, ...]) -> None:
    is_masked_attention(flash, lengths)


def test_flash_attention_in_a_window_is_masked_attention(flash: str) -> None:
    is_masked_attention(flash, (300, 212), sliding_window=100)


def test_flash_attention_goes_on_from_another_document(flash: str) -> None:
    if flash not in attention.PREFIXED:
        pytest.skip("prompt sharing is not supported here, and shares_prefixes says so")
    own, seen = (torch.arange(*ends, device=CUDA) for ends in ((300, 512), (0, 150)))
    ends = [torch.tensor([0, len(positions)], device=CUDA, dtype=torch.int32) for positions in (own, seen)]
    is_masked_attention(flash, (300, 212), prefixes=Prefixes(own, seen, *ends, len(own), len(seen)))


def test_flash_attention_runs_in_compiled_layers(flash: str) -> None:
    torch._dynamo.reset()
    plain = policy("adapter=lora", "train.precision=fp32", "train.compile=false", "model.attention=sdpa")
    fast = policy("adapter=lora", "train.precision=bf16", "train.compile=true", f"model.attention={flash}")
    same_weights(plain, fast)
    for packs in (batch(200, 31, 7, 120), batch(512, rows=1)):
        wanted, got = loss_and_gradients(plain, packs), loss_and_gradients(fast, packs)
        for name in wanted:
            assert error(got[name], wanted[name]) < 2.5e-2, name


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 20.0)])
def test_flex_attention_is_masked_attention(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 512, 64, device=CUDA).bfloat16().requires_grad_() for heads in (8, 2, 2))
    bounds = torch.tensor([0, 300, 512, 700, 1024], device=CUDA).int()
    settings = {"cu_seqlens_S": bounds, "max_seqlen": 512, "scaling": 0.1, "sliding_window": window, "softcap": softcap}
    masks = attention.block_masks("flex", bounds, 2, 512, window)
    got, _ = attention.flex(torch.nn.Identity(), query, key, value, None, **settings, **masks)
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted, _ = attention.sdpa(torch.nn.Identity(), *wide, None, **settings)
    assert error(got.float(), wanted) < 1e-2
    upstream = torch.randn_like(wanted)
    ours = torch.autograd.grad(got, [query, key, value], upstream.bfloat16())
    for mine, plain in zip(ours, torch.autograd.grad(wanted, wide, upstream), strict=True):
        assert error(mine.float(), plain) < 2e-2


def test_flex_attention_runs_in_compiled_layers() -> None:
    torch._dynamo.reset()
    plain = policy("adapter=lora", "train.precision=bf16", "train.compile=true")
    fast = policy("adapter=lora", "train.precision=bf16", "train.compile=true", "model.attention=flex")
    same_weights(plain, fast)
    packs = batch(200, 31, 7, 120)
    wanted, got = loss_and_gradients(plain, packs), loss_and_gradients(fast, packs)
    for name in wanted:
        assert error(got[name], wanted[name]) < 2.5e-2, name


@pytest.mark.parametrize(("rows", "columns", "ranks"), [(512, 1024, (8, 8)), (77, 200, (3, 40)), (1, 16, (64, 1))])
def test_the_kernels_of_a_gated_mlp_say_what_its_formulas_say(rows: int, columns: int, ranks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = [(rows, columns)] * 3 + [(rows, sum(ranks)), (columns, ranks[0]), (columns, ranks[1])]
    grad, *inputs = (torch.randn(shape, device=CUDA).bfloat16() for shape in shapes)
    wide = [x.float() for x in inputs]
    got = [gated.gated(*inputs), *gated.gated_backward(grad, *inputs)]
    wanted = [gated.gated(*wide), *gated.gated_backward(grad.float(), *wide)]
    for mine, plain in zip(got, wanted, strict=True):
        assert error(mine.float(), plain) < 5e-3


def test_attention_is_computed_once_where_its_output_is_kept() -> None:
    """In compiled layers that recompute the rest."""
    torch._dynamo.reset()
    model = policy("adapter=lora", "train.compile=true", "train.activation_checkpointing=offload")
    for packs in (batch(512, rows=1), batch(200, 31, 7, 120)):
        loss_and_gradients(model, packs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            loss_and_gradients(model, packs)
        names = [event.name for event in seen.events() or []]
        assert len([name for name in names if "fprop" in name or "flash_fwd" in name]) == 3, names


def chat_run(folder: Path, answer: str, *overrides: str) -> TrainRun:
    """A small run on 400 rows with this answer."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    (folder / "rows.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 400))
    files = [f"data.path={folder / 'rows.jsonl'}", f"data.cache={folder}", f"output_dir={folder / 'out'}"]
    return load_config("train", ["model=tiny_random", "resources=inline", "tracking=none", *files, *overrides])


def test_memory_that_runs_out_is_explained(tmp_path: Path) -> None:
    wide = ["adapter=none", "model.config.hidden_size=2048", "model.config.intermediate_size=8192", "data.max_length=2048"]
    kept = ["train.activation_checkpointing=none", "train.compile=false", "train.micro_batch_size=8"]
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(
            ResourceError, match=r"out of GPU memory during .*: the estimate was .* GiB were allocated.* [Ss]et train."
        ):
            api.train(chat_run(tmp_path, "b" * 400, *wide, *kept))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_profile_says_where_the_time_goes(tmp_path: Path) -> None:
    torch._dynamo.reset()
    sizes = ["train.max_steps=9", "train.global_batch_size=4", "data.max_length=256"]
    result = api.train(chat_run(tmp_path, "b" * 100, "train.profile=true", *sizes))
    shown = (result.output_dir / TABLE).read_text()
    for kind in ("attention", "matmul", "LoRA", "loss", "optimizer", "idle"):
        assert kind in shown, shown


def test_batches_with_other_boundaries_compile_nothing_again() -> None:
    torch._dynamo.reset()
    model = policy("adapter=lora", "train.compile=true")
    for lengths in [(200, 31, 7, 120), (100, 100, 50)]:
        loss_and_gradients(model, batch(*lengths))
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for lengths in [(150, 150, 20), (129, 1, 1, 1, 1), (256, 256)]:
            loss_and_gradients(model, batch(*lengths))
    finally:
        torch.compiler.set_stance("default")


def test_no_document_sees_another() -> None:
    model = policy("adapter=none", "train.compile=true", "train.precision=bf16")
    packs = batch(200, 31, 7, 120)
    changed = packs.ids_BT.clone()
    changed[:, :200] = 5
    before, after = model(packs, cross_entropy), model(replace(packs, ids_BT=changed), cross_entropy)
    later = packs.trained_N % 512 >= 200
    assert torch.equal(before[later], after[later])
    assert not torch.equal(before[~later], after[~later])
