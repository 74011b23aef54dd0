"""Several adapters in one pass on a GPU: each as near to itself alone as 16 bits allow, without a word from the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, LoraBank, PeftAdapters
from raytune_llm.models.adapters.bank import ROUTE
from raytune_llm.models.adapters.banked import BankedLinear
from raytune_llm.models.adapters.routes import Masked, Route, Sorted
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.records import Batch
from raytune_llm.train.loop import to_device
from tests.models import packed, some_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LENGTHS = (50, 90, 31, 120, 40, 7, 80, 60, 34)
RANKS = (2, 8, 4, 3, 1, 8, 5, 6)
SLOTS = {"two": (0, 1, -1, 1, 0, 0, -1, 1, 0), "eight": (3, 7, 0, -1, 2, 5, 1, 6, 4)}


def base(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).to(CUDA, dtype)
    attention.attach(model, "varlen" if dtype == torch.bfloat16 else "sdpa")
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for number, rank in enumerate(RANKS):
        model = get_peft_model(base(torch.float32), LoraConfig(r=rank, lora_alpha=4, target_modules="all-linear"))
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.05)
        made.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(made[-1])
    return made


def pack() -> Batch:
    return to_device(packed(some_rows(LENGTHS)), CUDA)


def route(form: str, slots: Sequence[int], num_slots: int, dtype: torch.dtype) -> Route:
    slot_T = torch.tensor(slots).repeat_interleave(torch.tensor(LENGTHS)).to(CUDA)
    return Sorted.of(slot_T, num_slots) if form == "sorted" else Masked.of(slot_T, num_slots, dtype)


def error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.float() - wanted.float()).norm() / wanted.float().norm()).item()


def alone(folder: Path, batch: Batch, upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    adapters = PeftAdapters(base(dtype))
    adapters.add_own(SavedAdapter(path=str(folder), setting="adapter.path"))
    hidden = CausalLM(adapters.model, compute=dtype).hidden(batch)
    (hidden * upstream).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in adapters.trained(OWN).items() if p.grad is not None}


def where(slots: Sequence[int], slot: int) -> Tensor:
    return torch.tensor([s == slot for s in slots]).repeat_interleave(torch.tensor(LENGTHS)).to(CUDA)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", ["sorted", "masked"])
@pytest.mark.parametrize("many", SLOTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2.5e-2)])
def test_each_adapter_of_several_is_itself_alone(
    dtype: torch.dtype, bound: float, many: str, form: str, compiled: bool, folders: list[Path]
) -> None:
    torch._dynamo.reset()
    slots = SLOTS[many]
    num_slots, batch, model = max(slots) + 1, pack(), base(dtype)
    bank = LoraBank(model, num_slots=num_slots, max_rank=8, dtype=dtype, trains=True)
    for slot in range(num_slots):
        bank.load(slot, folders[slot])
    for layer in model.model.layers if compiled else ():
        layer.compile()
    torch.manual_seed(1)
    upstream = torch.randn(1, sum(LENGTHS), SIZES["hidden_size"], device=CUDA) / sum(LENGTHS)
    hidden = CausalLM(model, compute=dtype, adapters=bank).hidden(batch, {ROUTE: route(form, slots, num_slots, dtype)})
    (hidden * upstream).sum().backward()
    with torch.no_grad():
        bare = CausalLM(base(dtype), compute=dtype).hidden(batch)
    none = where(slots, -1)
    assert error(hidden[0, none], bare[0, none]) < bound if compiled else torch.equal(hidden[0, none], bare[0, none])
    for slot in range(num_slots):
        mine = where(slots, slot)
        expected, gradients = alone(folders[slot], batch, upstream * mine[None, :, None], dtype)
        assert error(hidden[0, mine], expected[0, mine]) < bound
        for name, gradient in gradients.items():
            layer, _, kind = name.removeprefix("base_model.model.").rpartition(f".{OWN}.")[0].rpartition(".")
            banked = model.get_submodule(layer)
            assert isinstance(banked, BankedLinear)
            own = banked.a_GRK.grad[slot] if kind == "lora_A" else banked.b_GRO.grad[slot].T
            own = own[: len(gradient)] if kind == "lora_A" else own[:, : gradient.shape[1]]
            assert error(own, gradient) < 4 * bound, name


@pytest.mark.parametrize("form", ["sorted", "masked"])
def test_a_pass_of_several_adapters_never_waits_for_the_device(form: str, folders: list[Path]) -> None:
    slots, batch, model = SLOTS["two"], pack(), base(torch.bfloat16)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.bfloat16)
    for slot in range(2):
        bank.load(slot, folders[slot])
    policy = CausalLM(model, compute=torch.bfloat16, adapters=bank)
    slot_M = torch.tensor(slots, device=CUDA)
    with torch.no_grad():
        policy.hidden(batch, bank.by_documents(slot_M, batch.cu_seqlens_S, sum(LENGTHS)))
        torch.cuda.set_sync_debug_mode("error")
        try:
            slot_T = slot_M.repeat_interleave(batch.cu_seqlens_S.diff(), output_size=sum(LENGTHS))
            sorted_ = bank.by_documents(slot_M, batch.cu_seqlens_S, sum(LENGTHS))
            policy.hidden(batch, sorted_ if form == "sorted" else bank.by_tokens(slot_T))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_holds_a_pass_whose_adapters_change_between_replays(folders: list[Path]) -> None:
    model = base(torch.bfloat16)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    bank.load(0, folders[1])
    x = torch.randn(4, SIZES["hidden_size"], device=CUDA, dtype=torch.bfloat16)
    slot_T = torch.tensor([0, -1, 0, -1], device=CUDA)

    @torch.no_grad()
    def run() -> Tensor:
        layer.now.route = bank.by_tokens(slot_T)[ROUTE]
        return layer(x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for slots in ([0, -1, 0, -1], [1, 0, -1, 1]):
        bank.load(1, folders[2])
        slot_T.copy_(torch.tensor(slots))
        graph.replay()
        assert torch.equal(out, run())
