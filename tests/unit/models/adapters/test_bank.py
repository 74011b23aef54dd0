"""Several adapters in one forward pass are each what they are alone; the base is as if they were not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.data.batches import collate
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, LoraBank, PeftAdapters
from raytune_llm.models.adapters.bank import ROUTE
from raytune_llm.models.adapters.banked import BankedLinear
from raytune_llm.models.adapters.routes import Dropout, Dropped, InTurn, Masked, Ranges, Route, Sorted
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.shared_pass import repeated
from raytune_llm.records import Batch, Prefixes
from tests.models import lora_section, packed, some_rows

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LENGTHS = (5, 9, 3, 12, 4, 7, 8, 6, 10)
RANKS = (2, 8, 4, 3, 1, 8, 5, 6)
FORMS = ("ranges", "sorted", "masked", "in turn")


def base(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    attention.attach(model, "varlen")
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of several ranks, one on some layers only, one with a scale by the root of its rank, saved by PEFT."""
    made = []
    for number, rank in enumerate(RANKS):
        targets = ["q_proj", "down_proj"] if number == 2 else "all-linear"
        config = LoraConfig(r=rank, lora_alpha=4, target_modules=targets, use_rslora=number == 3, task_type="CAUSAL_LM")
        model = get_peft_model(base(), config)
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        made.append(tmp_path_factory.mktemp("adapter"))
        model.save_pretrained(made[-1])
    return made


def pack() -> Batch:
    return packed(some_rows(LENGTHS))


def route(form: str, slots: Sequence[int], num_slots: int, rank: int = 8) -> Route:
    if form == "ranges":
        return Ranges.of(slots, LENGTHS)
    slot_T = torch.tensor(slots).repeat_interleave(torch.tensor(LENGTHS))
    if form == "in turn":
        first = sum(LENGTHS[:2])
        return InTurn(Masked.of(slot_T[:first], num_slots, torch.float32), Ranges.of(slots[2:], LENGTHS[2:]), first)
    return Sorted.of(slot_T, num_slots) if form == "sorted" else Masked.of(slot_T, num_slots, torch.float32)


def alone(folder: Path | None, batch: Batch, upstream: Tensor, family: str = "llama") -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and gradients of the adapter, of the one adapter over the whole pack."""
    model = base(family)
    if folder is None:
        with torch.no_grad():
            return CausalLM(model).hidden(batch), {}
    adapters = PeftAdapters(model)
    adapters.add_own(SavedAdapter(path=str(folder), setting="adapter.path"))
    with torch.enable_grad():
        hidden = CausalLM(adapters.model).hidden(batch)
        (hidden * upstream).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in adapters.trained(OWN).items() if p.grad is not None}


def documents(slots: Sequence[int], slot: int) -> Tensor:
    """[1, T, 1]: where the documents of this slot are."""
    return torch.tensor([float(s == slot) for s in slots]).repeat_interleave(torch.tensor(LENGTHS))[None, :, None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "slots", [(0, 1, -1, 1, 0, 0, -1, 1, 0), (3, 7, 0, -1, 2, 5, 1, 6, 4)], ids=["two adapters", "eight adapters"]
)
def test_each_adapter_in_a_batch_of_several_is_itself_alone(form: str, slots: tuple[int, ...], folders: list[Path]) -> None:
    num_slots = max(slots) + 1
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy, batch = CausalLM(model), pack()
    bank = LoraBank(model, num_slots=num_slots, max_rank=8, dtype=torch.float32, trains=True)
    for slot in range(num_slots):
        bank.load(slot, folders[slot])
    torch.manual_seed(1)
    upstream = torch.randn(1, sum(LENGTHS), SIZES["hidden_size"]) / sum(LENGTHS)  # as of a mean over tokens
    hidden = policy.hidden(batch, {ROUTE: route(form, slots, num_slots)})
    (hidden * upstream).sum().backward()
    with torch.no_grad():  # some forms then add in the outputs' place
        assert torch.equal(policy.hidden(batch, {ROUTE: route(form, slots, num_slots)}), hidden)
    bare, _ = alone(None, batch, upstream)
    none = documents(slots, -1).bool().flatten()
    assert torch.equal(hidden[0, none], bare[0, none])
    for slot in range(num_slots):
        where = documents(slots, slot)
        expected, gradients = alone(folders[slot], batch, upstream * where)
        mine = where.bool().flatten()
        torch.testing.assert_close(hidden[0, mine], expected[0, mine], rtol=1e-5, atol=1e-5)
        assert gradients and (expected - bare)[0, mine].abs().max() > 1e-2
        for name, gradient in gradients.items():
            layer, _, kind = name.removeprefix("base_model.model.").rpartition(f".{OWN}.")[0].rpartition(".")
            banked = model.get_submodule(layer)
            assert isinstance(banked, BankedLinear)
            found: Any = (banked.a_GRK if kind == "lora_A" else banked.b_GRO).grad
            own = found if kind == "lora_A" else found.transpose(1, 2)
            own = own[slot, : gradient.shape[0]] if kind == "lora_A" else own[slot, :, : gradient.shape[1]]
            torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        if name.removesuffix(".a_GRK") == name.removesuffix(".b_GRO"):
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    for banked in (module for module in model.modules() if isinstance(module, BankedLinear)):
        assert banked.base_layer.weight.grad is None
        for grad in (banked.a_GRK.grad, banked.b_GRO.grad):
            assert grad is not None and not grad[-1].any(), "the slot of no adapter takes nothing"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gemma", "phi3", "gemma2"])
def test_families_with_and_without_grouped_forms_take_several_adapters(form: str, family: str, tmp_path: Path) -> None:
    model = base(family)
    peft = get_peft_model(base(family), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(tmp_path))
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
    bank.load(1, tmp_path)
    batch, upstream = pack(), torch.zeros(1, sum(LENGTHS), 1)
    slots = (1, -1, 1, 1, -1, -1, 1, 1, -1)
    with torch.no_grad():
        hidden = CausalLM(model).hidden(batch, {ROUTE: route(form, slots, 2)})
    for slot, folder in ((-1, None), (1, tmp_path)):
        mine = documents(slots, slot).bool().flatten()
        expected, _ = alone(folder, batch, upstream, family)
        torch.testing.assert_close(hidden[0, mine], expected[0, mine], rtol=1e-5, atol=1e-5)


def test_rows_that_decode_before_prompts_share_a_product_and_are_what_ranges_make_of_them(folders: list[Path]) -> None:
    slots, lengths = (0, 2, 1, -1, 2, -1), (1, 1, 1, 1, 7, 5)
    policy, batch = CausalLM(base()), packed(some_rows(lengths))
    bank = LoraBank(policy.base, num_slots=3, max_rank=8, dtype=torch.float32)
    for slot in range(3):
        bank.load(slot, bank.read(folders[slot]))
    chosen = bank.by_documents(torch.tensor(slots), batch.cu_seqlens_S, sum(lengths))
    assert isinstance(chosen[ROUTE], InTurn)
    with torch.no_grad():
        ranges = policy.hidden(batch, {ROUTE: Ranges.of(slots, lengths)})
        torch.testing.assert_close(policy.hidden(batch, chosen), ranges, rtol=1e-5, atol=1e-6)
        assert torch.equal(policy.hidden(batch, chosen)[0, [3, *range(11, 16)]], policy.hidden(batch, {})[0, [3, *range(11, 16)]])


def test_slots_are_filled_and_cleared_between_passes_and_the_base_comes_back_to_the_bit(folders: list[Path]) -> None:
    model, batch = base(), pack()
    with torch.no_grad():
        bare = CausalLM(model).hidden(batch)
        bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
        every = bank.by_documents(torch.zeros(len(LENGTHS), dtype=torch.int64), batch.cu_seqlens_S, sum(LENGTHS))
        assert torch.equal(CausalLM(model).hidden(batch), bare)
        assert torch.equal(CausalLM(model).hidden(batch, every), bare), "an empty slot"
        for folder in (folders[1], folders[2]):
            bank.load(0, bank.read(folder))
            expected, _ = alone(folder, batch, bare[..., :1])
            torch.testing.assert_close(CausalLM(model).hidden(batch, every), expected, rtol=1e-5, atol=1e-5)
        bank.clear(0)
        assert torch.equal(CausalLM(model).hidden(batch, every), bare)


def test_a_bank_is_asked_by_name_as_any_adapters_are(folders: list[Path], tmp_path: Path) -> None:
    model, batch = base(), pack()
    bank, policy = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32), CausalLM(model)
    for name, folder in (("a.1", folders[1]), ("a.2", folders[3])):
        bank.add(name, SavedAdapter(path=str(folder), setting="serve.adapters"))
    assert bank.names == ("a.1", "a.2") and bank.slots == {"a.1": 0, "a.2": 1}
    with pytest.raises(ConfigError, match="all 2 slots are taken"):
        bank.add("a.3", SavedAdapter(path=str(folders[0]), setting="serve.adapters"))
    with torch.no_grad(), bank.using("a.2"):
        expected, _ = alone(folders[3], batch, torch.zeros(1, 1, 1))
        torch.testing.assert_close(policy.hidden(batch), expected, rtol=1e-5, atol=1e-5)
    bank.save("a.2", tmp_path)
    for name, value in load_file(folders[3] / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "adapter_model.safetensors")[name], value)
    with torch.no_grad():
        saved, _ = alone(tmp_path, batch, torch.zeros(1, 1, 1))
        torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-5)
    bank.remove("a.1")
    bank.add("a.3", SavedAdapter(path=str(folders[0]), setting="serve.adapters"))
    assert bank.slots == {"a.2": 1, "a.3": 0}


def test_a_new_adapter_in_a_trained_bank_is_the_one_that_a_run_begins_with() -> None:
    section = lora_section(rank=3, alpha=6.0, last_layers=1)
    adapters = PeftAdapters(base())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        adapters.add_own(section)
    model = base()
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32, trains=True)
    bank.add("trial", section, seed=7)
    compared = 0
    for name, parameter in adapters.trained(OWN).items():
        if "lora_A" in name:
            layer = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            assert torch.equal(layer.a_GRK[0, :3], parameter)
            compared += 1
    assert compared == 7
    assert not model.model.layers[0].mlp.up_proj.a_GRK.any()


def test_layers_that_are_computed_again_see_the_route_of_their_pass(folders: list[Path]) -> None:
    """Also where another pass, of another route, has come in between."""
    batch, gradients = pack(), []
    for checkpointing in (False, True):
        model = base().train()
        bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32, trains=True)
        for slot in range(2):
            bank.load(slot, folders[slot])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = CausalLM(model)
        hidden = policy.hidden(batch, {ROUTE: route("ranges", (0, 1, -1, 1, 0, 0, -1, 1, 0), 2)})
        policy.hidden(batch)
        hidden.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 2 * 7 * 2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["sorted", "masked"])
def test_compiled_layers_say_the_same_and_other_routes_of_one_shape_compile_nothing_again(form: str, folders: list[Path]) -> None:
    torch._dynamo.reset()
    batch, model = pack(), base()
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
    for slot in range(2):
        bank.load(slot, folders[slot])
    routes = [{ROUTE: route(form, slots, 2)} for slots in ((0, 1, -1, 1, 0, 0, -1, 1, 0), (1, 1, 0, -1, 0, 0, -1, 1, 0))]
    policy = CausalLM(model)
    with torch.no_grad():
        plain = [policy.hidden(batch, one) for one in routes]
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(policy.hidden(batch, routes[0]), plain[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(policy.hidden(batch, routes[1]), plain[1])


def test_one_adapter_that_has_grown_infinite_leaves_the_others_as_they_are(folders: list[Path]) -> None:
    """Of several that are trained: its own run has failed, and no other."""
    batch, slots = pack(), (0, 1, -1, 1, 0, 0, -1, 1, 0)
    for form in ("ranges", "sorted"):
        found = []
        for spoiled in (False, True):
            model = base()
            bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32, trains=True)
            for slot in range(2):
                bank.load(slot, folders[slot])
            if spoiled:
                model.model.layers[0].mlp.up_proj.b_GRO.data[1] = float("inf")
            hidden = CausalLM(model).hidden(batch, {ROUTE: route(form, slots, 2)})
            hidden.square().mean().backward()
            mine = documents(slots, 0).bool().flatten()
            found.append([hidden[0, mine], *(p.grad[0] for p in model.parameters() if p.grad is not None)])
        assert not any(torch.isnan(value).any() for value in found[1])
        for whole, spoilt in zip(*found, strict=True):
            torch.testing.assert_close(whole, spoilt)


def test_an_adapter_that_does_not_fit_a_bank_is_refused_by_name(folders: list[Path], tmp_path: Path) -> None:
    bank = LoraBank(base(), num_slots=1, max_rank=8, dtype=torch.float32)
    narrow = LoraBank(base(), num_slots=1, max_rank=8, dtype=torch.float32, targets=["q_proj", "v_proj"])
    weights = load_file(folders[0] / "adapter_model.safetensors")
    first = next(iter(weights))

    def changed(changes: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes})
        config.save_pretrained(str(tmp_path))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    wide = {name: value.repeat(5, 1) if "lora_A" in name else value.repeat(1, 5) for name, value in weights.items()}
    spoilt = {**weights, first: weights[first] * float("nan")}
    grown = {name: torch.full_like(value, 3e38) if "lora_B" in name else value for name, value in weights.items()}  # scaled by 2
    cases: list[tuple[LoraBank, dict[str, Any], dict[str, Tensor], str]] = [
        (bank, {}, wide, "rank 10, and slots have rank 8"),
        (bank, {}, spoilt, "not finite"),
        (bank, {}, grown, "not finite"),
        (bank, {}, {first: weights[first]}, "only one of A and B"),
        (bank, {}, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, "is on lm_head, outside of the layers"),
        (narrow, {}, weights, "for layers without a bank"),
        (bank, {}, {name: value[:, :-1].contiguous() for name, value in weights.items()}, "has A .* there, and is 32 -> 32 here"),
        (bank, {}, {}, "holds no tensor"),
        (bank, {}, {name: torch.tensor(1.0) for name in weights}, r"has an A of shape \[\], which has no rank"),
        (bank, {"use_dora": True}, weights, "be plain LoRA .* and is with DoRA"),
        (bank, {"modules_to_save": ["lm_head"]}, weights, "and is with whole modules"),
        (bank, {"bias": "lora_only"}, weights, "and is with biases"),
        (bank, {"init_lora_weights": "pissa_niter_4"}, weights, "and is initialized by pissa_niter_4, which changes the base"),
        (bank, {"layer_replication": [[0, 2], [0, 2]]}, weights, "and is with layers that are repeated"),
        (bank, {"r": 4}, weights, "has rank 2 by its tensors, but 4 by its config"),
        (bank, {"rank_pattern": {"down_proj": 3}}, weights, "down_proj has rank 2 by its tensors, but 3 by its config"),
        (bank, {"rank_pattern": {"(": 2}}, weights, "must be objects of patterns"),
        (bank, {"alpha_pattern": {"q_proj": "many"}}, weights, "no number for .*q_proj, but 'many'"),
        (bank, {"lora_alpha": None}, weights, "no number for .*, but None"),
        (bank, {"lora_alpha": "x"}, weights, "lora_alpha is no number: 'x'"),
    ]
    for one, changes, tensors, said in cases:
        with pytest.raises(ConfigError, match=rf"the adapter must .*{said}"):
            one.read(changed(changes, tensors))


def test_a_bank_stands_over_a_base_that_is_quantized(folders: list[Path]) -> None:
    pytest.importorskip("bitsandbytes")
    from raytune_llm.config.quantization import NF4
    from raytune_llm.models.layers import layers
    from raytune_llm.models.quantization import quantize

    batch, slots = pack(), (0, -1, 0, 0, -1, 0, -1, 0, 0)
    section = NF4(name="bnb_nf4")
    quantized, model = base().requires_grad_(False), base().requires_grad_(False)
    for one in (quantized, model):
        quantize(layers(one), section, torch.device("cpu"))
    bank = LoraBank(model, num_slots=1, max_rank=8, dtype=torch.float32)
    bank.load(0, folders[1])
    adapters = PeftAdapters(base())
    adapters.add_own(SavedAdapter(path=str(folders[1]), setting="x"))
    quantize(layers(adapters.base.requires_grad_(False)), section, torch.device("cpu"))
    with torch.no_grad():
        hidden = CausalLM(model).hidden(batch, {ROUTE: route("ranges", slots, 1)})[0]
        none, mine = (documents(slots, slot).bool().flatten() for slot in (-1, 0))
        assert torch.equal(hidden[none], CausalLM(quantized).hidden(batch)[0][none])
        torch.testing.assert_close(hidden[mine], CausalLM(adapters.model).hidden(batch)[0][mine], rtol=1e-5, atol=1e-5)


def test_a_batch_says_which_adapter_each_of_its_documents_is_for(folders: list[Path]) -> None:
    """Padding, which is a document too, is for none."""
    model, slots = base(), (0, 1, -1, 1, 0, 0, -1, 1, 0)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
    for slot in range(2):
        bank.load(slot, folders[slot])
    policy, rows = CausalLM(model, adapters=bank), some_rows(LENGTHS)
    of_documents = [(*row, 0, (), slot) for row, slot in zip(rows, slots, strict=True)]
    batch = collate([of_documents], length=sum(LENGTHS) + 9, pad_id=0)
    assert batch.adapter_M is not None and batch.adapter_M.tolist()[-1] == -1
    with torch.no_grad():
        without = policy(replace(batch, adapter_M=None), cross_entropy)
        mixed = policy(batch, cross_entropy)
        expected = policy.hidden(pack(), {ROUTE: route("ranges", slots, 2)})
        torch.testing.assert_close(policy.hidden(batch)[:, : sum(LENGTHS)], expected)
    assert not torch.allclose(without, mixed)


def test_a_trained_bank_is_resized_between_steps_and_keeps_its_adapters(folders: list[Path]) -> None:
    model = base()
    bank = LoraBank(model, num_slots=5, max_rank=8, dtype=torch.float32, trains=True)
    for name, folder in zip("abcd", folders, strict=False):
        bank.add(name, SavedAdapter(path=str(folder), setting="adapter.path"))
    parts = {name: {key: value.clone() for key, value in bank.part(name).items()} for name in "bd"}
    for name in "ac":
        bank.remove(name)
    bank.resize(2)
    assert bank.slots == {"b": 0, "d": 1} and bank.num_slots == 2
    for name, part in parts.items():
        assert all(torch.equal(value, part[key]) for key, value in bank.part(name).items())
    rows, routed = pack(), bank.in_turn([0, 1], sum(LENGTHS))
    both = CausalLM(model).hidden(repeated(rows, 2), routed)
    for number, folder in enumerate((folders[1], folders[3])):
        expected, _ = alone(folder, rows, torch.zeros(1, 1, 1))
        torch.testing.assert_close(both[number : number + 1], expected, rtol=1e-5, atol=1e-5)


def test_in_turn_is_the_same_for_ranges_and_for_sorted_tokens(folders: list[Path]) -> None:
    turns = Sorted.in_turn([0, 2, -1], 4, 3, torch.device("cpu"))
    by_token = Sorted.of(torch.tensor([0] * 4 + [2] * 4 + [-1] * 4), 3, in_order=True)
    assert turns.ends_G1.tolist() == by_token.ends_G1.tolist() == [4, 4, 8, 12]


def test_dropout_of_one_adapter_is_that_of_a_run_alone_also_where_a_layer_is_computed_again() -> None:
    layer, x = nn.Linear(2, 2), torch.randn(6, 8)
    generator = torch.Generator()
    dropped = Dropped(Sums(), 3, (None, Dropout(0.5, generator)))
    generator.manual_seed(5)
    dropped.begin(layer)
    (first,) = dropped.add([], x, [], [])
    torch.manual_seed(5)
    assert torch.equal(first[:3], x[:3]) and torch.equal(first[3:], nn.functional.dropout(x[3:], 0.5))
    dropped.begin(layer)
    (again,) = dropped.add([], x, [], [])
    assert torch.equal(first, again)


class Sums:
    """A route that gives what it is given."""

    def add(
        self, outs: Sequence[Tensor], x_TK: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], whole: object | None = None
    ) -> list[Tensor]:
        return [x_TK]


def test_a_repeated_batch_keeps_its_documents_and_its_shared_prompts_apart() -> None:
    batch = pack()
    twice = repeated(batch, 2)
    end = int(batch.cu_seqlens_S[-1])
    assert twice.cu_seqlens_S.tolist() == [*batch.cu_seqlens_S.tolist(), *(end + batch.cu_seqlens_S[1:]).tolist()]
    parts: Any = [torch.tensor(part) for part in ([3, 4], [0, 1, 0, 1], [0, 1, 2], [0, 2, 4])]
    prefixes = Prefixes(parts[0], parts[1], parts[2], parts[3], 1, 2)
    shared = repeated(replace(batch, prefixes=prefixes), 2).prefixes
    assert shared is not None and shared.queries_Q.tolist() == [3, 4, end + 3, end + 4]
    assert shared.keys_K.tolist() == [0, 1, 0, 1, end, end + 1, end, end + 1]
    assert shared.cu_queries_X.tolist() == [0, 1, 2, 3, 4] and shared.cu_keys_X.tolist() == [0, 2, 4, 6, 8]
