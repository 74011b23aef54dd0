"""Each kind of adapter is its formula, changes nothing before it is trained, and is the same in a pack, saved, and merged."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.adapters import OWN, PeftAdapters
from raytune_llm.models.adapters.dora import Lengths, put_lengths
from raytune_llm.models.adapters.methods import METHODS
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import files_to_read, load_model
from raytune_llm.records import Batch
from tests.models import packed, some_rows

LENGTHS = (3, 17, 5, 12)
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


LOW_RANK = ["adapter.rank=4", "adapter.alpha=6"]
OF_LORA = {
    **{kind: [f"adapter={kind}"] for kind in ("lora", "rslora", "lora_plus", "dora", "pissa", "eva")},
    "loftq": ["adapter=loftq", "quantization=bnb_nf4"],
    "dora with rslora": ["adapter=dora", "adapter.rslora=true"],
    "pissa with rslora": ["adapter=pissa", "adapter.rslora=true"],
    "pissa with dora": ["adapter=pissa", "adapter.dora=true"],
    "pissa with dora with rslora": ["adapter=pissa", "adapter.dora=true", "adapter.rslora=true"],
}
SETTINGS = {
    **{kind: [*settings, *LOW_RANK] for kind, settings in OF_LORA.items()},
    "oft": ["adapter=oft", "adapter.block_size=8"],
    "vera": ["adapter=vera", "adapter.rank=6"],
    "ia3": ["adapter=ia3", "adapter.targets=all-linear"],
}
"""Every method, and the variants of LoRA together."""
KINDS = list(SETTINGS)


def test_there_are_settings_for_every_method() -> None:
    assert METHODS.keys() == {section(kind).name for kind in KINDS}


def saved_as(kind: str) -> str:
    """What a folder with one of these holds, for whoever reads it."""
    left = [word for word in kind.split(" with ") if word not in ("lora", "lora_plus", "pissa", "loftq", "eva")]
    return " with ".join(left) or "lora"


PREFIXES = {"oft": "oft_", "vera": "vera_", "ia3": "ia3_"}


def section(kind: str, *overrides: str) -> Any:
    return load_config("train", ["data.path=x", *SETTINGS[kind], *overrides]).adapter


def base(backend: str = "varlen") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=2, **SIZES)).eval()
    attention.attach(model, backend)
    return model


def adapted(kind: str, *overrides: str, drawn: bool = True) -> CausalLM:
    """drawn: as if it had learned something."""
    adapters = PeftAdapters(base())
    adapters.add_own(section(kind, *overrides))
    torch.manual_seed(1)
    for parameter in adapters.trained(OWN).values():
        if drawn:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return CausalLM(adapters.model)


def hidden(policy: CausalLM, batch: Batch | None = None) -> Tensor:
    with torch.no_grad():
        return policy.hidden(batch or packed(some_rows(LENGTHS)))


def skew(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices, by the part above the diagonal in row-major order."""
    filled = torch.zeros(len(vectors), size, size, dtype=vectors.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    filled[:, rows, columns] = vectors
    return filled - filled.transpose(1, 2)


def formula(kind: str, layer: Any, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    w = layer.base_layer.weight.double()
    if kind == "ia3":
        given = own["ia3_l"].flatten()
        return (x * given) @ w.T if layer.is_feedforward else x @ w.T * given
    if kind == "vera":
        a, b = layer.vera_A["default"][:, : w.shape[1]].double(), layer.vera_B["default"][: w.shape[0]].double()
        return x @ (w + own["vera_lambda_b"][:, None] * b @ (own["vera_lambda_d"][:, None] * a)).T
    if kind == "oft":
        q = skew(own["oft_R"], 8)
        powers = [torch.linalg.matrix_power(q, n) for n in range(5)]
        turns = powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4]  # (I + Q)(I - Q)^-1, to the fourth power
        return x @ torch.block_diag(*turns) @ w.T
    scale = 6 / math.sqrt(4) if "rslora" in kind else 6 / 4
    v = w + scale * own["lora_B"] @ own["lora_A"]
    if "dora" in kind:
        v = own["lora_magnitude_vector"][:, None] * v / v.norm(dim=1, keepdim=True)
    return x @ v.T


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_formula_of_its_kind(kind: str) -> None:
    policy = adapted(kind)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        layer = policy.base.model.layers[1].get_submodule(name)
        x = torch.randn(5, layer.in_features)
        own = {n.partition(".")[0]: p.detach().double() for n, p in layer.named_parameters() if p.requires_grad}
        expected = formula(kind, layer, x.double(), own)
        assert (expected - x.double() @ layer.base_layer.weight.double().T).abs().max() > 0.01
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_without_the_product_of_b_and_a_gives_the_output_and_gradients_of_peft_s(dropout: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    theirs = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout, init_lora_weights=False, target_modules=["0"]),
        nn.Sequential(layer),
    )
    ours = copy.deepcopy(theirs)
    put_lengths(ours, "default")
    assert any(isinstance(module, Lengths) for module in ours.modules())
    x = torch.randn(7, 24)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, mine), peft in pairs:
        assert (mine.grad is None) == (peft.grad is None), name
        if mine.grad is not None and peft.grad is not None:
            torch.testing.assert_close(mine.grad, peft.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_leaves_the_model_as_it_was_and_trains_small_parts_of_it(kind: str) -> None:
    policy, bare = adapted(kind, drawn=False), CausalLM(base())
    torch.testing.assert_close(hidden(policy), hidden(bare), rtol=1e-5, atol=1e-6)
    with policy.adapters.using(None):
        assert torch.equal(hidden(policy), hidden(bare)) != section(kind).changes_base
    trained = {name for name, parameter in policy.base.named_parameters() if parameter.requires_grad}
    assert trained and all(f".{PREFIXES.get(kind, 'lora_')}" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in policy.adapters.trained(OWN).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_a_pack_is_computed_as_if_alone_and_gradients_add_up(kind: str) -> None:
    rows = some_rows(LENGTHS)
    together, alone = adapted(kind), adapted(kind)
    values = together(packed(rows, length=50), cross_entropy)
    values.sum().backward()
    parts = [alone(packed([row]), cross_entropy) for row in rows]
    torch.testing.assert_close(values, torch.cat(parts), rtol=1e-5, atol=1e-5)
    sum(part.sum() for part in parts).backward()  # type: ignore[union-attr]
    for (name, ours), theirs in zip(together.adapters.trained(OWN).items(), alone.adapters.trained(OWN).values(), strict=True):
        assert ours.grad is not None and ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in together.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_says_the_same_in_plain_peft_merged_and_continued(kind: str, tmp_path: Path) -> None:
    policy = adapted(kind)
    policy.adapters.save(OWN, tmp_path, base_model="some/base")
    ids = torch.arange(24).view(2, 12)
    eager = base()
    eager.set_attn_implementation("eager")
    elsewhere: Any = PeftModel.from_pretrained(eager, str(tmp_path)).eval()
    with torch.no_grad():
        logits = elsewhere(ids).logits
        policy.base.set_attn_implementation("eager")
        torch.testing.assert_close(policy.base(ids).logits, logits, rtol=1e-5, atol=1e-5)
        continued = PeftAdapters(base())
        continued.add_own(section(saved_as(kind), f"adapter.path={tmp_path}"))
        continued.base.set_attn_implementation("eager")
        torch.testing.assert_close(continued.base(ids).logits, logits, rtol=1e-5, atol=1e-5)
        merged = elsewhere.merge_and_unload()
        assert list(merged.state_dict()) == list(base().state_dict())
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-5, atol=1e-5)
    for other in KINDS:
        if saved_as(other) != saved_as(kind) or "pissa" in other:
            with pytest.raises(
                ConfigError, match=r"adapter\.(path must hold an adapter of the kind|(dora|rslora) must be as in)"
            ):
                PeftAdapters(base()).add_own(section(other, f"adapter.path={tmp_path}"))


@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "vera"])
def test_a_continued_adapter_has_the_dropout_of_the_run(kind: str, tmp_path: Path) -> None:
    for before, now in ((0.0, 0.5), (0.5, 0.0)):
        adapted(kind, f"adapter.dropout={before}").adapters.save(OWN, tmp_path, base_model="some/base")
        (adapters := PeftAdapters(base())).add_own(section(kind, f"adapter.path={tmp_path}", f"adapter.dropout={now}"))
        policy = CausalLM(adapters.model).train()
        assert torch.equal(hidden(policy), hidden(policy)) == (now == 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_of_weights_in_files_are_those_of_loaded_ones(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of weights [K, N] as GPT-2 has them, and of embeddings, whose magnitudes are of columns."""
    torch.manual_seed(0)
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97}, "llama": SIZES}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes[family])).save_pretrained(tmp_path)
    config, settings = AutoConfig.from_pretrained(tmp_path), {"weights": "pretrained", "dtype": dtype, "seed": 0}
    targets = {"gpt2": "[c_attn,c_proj,wte]", "llama": "[k_proj,down_proj,embed_tokens]"}
    found = []
    for files in (None, files_to_read(config, str(tmp_path))):
        adapters = PeftAdapters(load_model(config, str(tmp_path), files=files, **settings))
        adapters.add_own(section("dora", f"adapter.targets={targets[family]}"))
        found.append({name: value for name, value in adapters.trained(OWN).items() if "magnitude" in name})
    assert len(found[0]) > 2 and found[0].keys() == found[1].keys()
    for name, loaded in found[0].items():
        torch.testing.assert_close(found[1][name], loaded, rtol=1e-6, atol=0)


def test_an_adapter_that_is_continued_in_another_way_is_refused_by_the_way(tmp_path: Path) -> None:
    adapted("dora with rslora").adapters.save(OWN, tmp_path, base_model="some/base")
    for kind, said in {
        "dora": r"adapter\.rslora must be as in the adapter that is continued, true, got False\. Set adapter\.rslora=true",
        "lora": r"adapter\.dora must be as in the adapter that is continued, true, got False",
        "oft": r"adapter\.path must hold an adapter of the kind that is trained, oft, which is dora there",
    }.items():
        with pytest.raises(ConfigError, match=said):
            PeftAdapters(base()).add_own(section(kind, f"adapter.path={tmp_path}"))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_recomputed_layers_say_the_same(kind: str) -> None:
    torch._dynamo.reset()
    rows, found = packed(some_rows(LENGTHS)), []
    for way in ("plain", "compiled", "recomputed"):
        policy = adapted(kind).train()
        for layer in policy.base.model.layers:
            if way == "compiled":
                layer.compile(backend="aot_eager")
        if way == "recomputed":
            policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy(rows, cross_entropy).sum().backward()
        found.append({name: parameter.grad for name, parameter in policy.adapters.trained(OWN).items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def test_how_each_kind_is_computed_is_told() -> None:
    said = {kind: adapted(kind).adapters.described("cpu") for kind in KINDS}
    together = "projections of one input together"
    lengths = {kind: "a layer at a time, as PEFT computes dora" for kind in OF_LORA if "dora" in kind}
    alone = {kind: f"a layer at a time, as PEFT computes {kind}" for kind in ("oft", "vera", "ia3")}
    assert said == {**dict.fromkeys(OF_LORA, together), **lengths, **alone}


@pytest.mark.parametrize("kind", OF_LORA)
def test_the_rate_of_b_is_set_for_any_kind_of_lora(kind: str) -> None:
    (adapters := PeftAdapters(base())).add_own(section(kind, "adapter.lr_ratio=8"))
    factors = {name: adapters.lr_factor(name) for name in adapters.trained(OWN)}
    assert {factor for name, factor in factors.items() if ".lora_B." in name} == {8.0}
    assert {factor for name, factor in factors.items() if ".lora_B." not in name} == {1.0}


@pytest.mark.parametrize("kind", [kind for kind in OF_LORA if kind != "lora"])
def test_kinds_of_lora_refuse_a_rank_above_a_layers_size(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank must be at most 16, the smaller side of k_proj"):
        PeftAdapters(base()).add_own(section(kind, "adapter.rank=20"))


@pytest.mark.parametrize("kind", [kind for kind in OF_LORA if kind != "lora"])
def test_ranks_of_patterns_are_held_against_their_layers_alone(kind: str) -> None:
    patterns = "adapter.rank_pattern={k_proj:16,v_proj:16}"
    (adapters := PeftAdapters(base())).add_own(section(kind, "adapter.rank=20", patterns))
    assert adapters.max_rank == 20
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern must be at most 16, the smaller side of k_proj, got 18"):
        PeftAdapters(base()).add_own(section(kind, "adapter.rank_pattern={k_proj:18}"))


@pytest.mark.parametrize("kind", ["pissa", "loftq", "eva", "oft", "vera", "ia3"])
def test_kinds_for_linear_layers_refuse_embeddings(kind: str) -> None:
    settings = section(kind, "adapter.targets=[embed_tokens]", *(["adapter.scaled_inputs=[]"] if kind == "ia3" else []))
    with pytest.raises(ConfigError, match=rf"adapter\.targets must name linear layers with adapter={kind}, got .*embed_tokens"):
        PeftAdapters(base()).add_own(settings)


def test_a_number_of_blocks_is_a_size_by_layer() -> None:
    by_number, by_size = (adapted("oft", *words) for words in (["adapter.block_size=null", "adapter.blocks=4"], []))
    assert by_number.adapters.names == by_size.adapters.names
    for model in (by_number, by_size):
        sizes = {part.oft_block_size[OWN] * part.r[OWN] for part in model.modules() if hasattr(part, "oft_block_size")}
        assert sizes == {32, 48}
    own = {name: value.shape for name, value in by_number.named_parameters() if "oft_R" in name}
    assert {shape[0] for shape in own.values()} == {4}
    with pytest.raises(ConfigError, match=r"adapter.blocks must divide the 32 inputs of .*got 5"):
        PeftAdapters(base()).add_own(section("oft", "adapter.block_size=null", "adapter.blocks=5"))
    with pytest.raises(
        ConfigError, match=r"adapter.blocks must be given where adapter.block_size is null, and only there, got 4"
    ):
        section("oft", "adapter.blocks=4")


def test_oft_on_layers_that_peft_has_none_for_is_refused() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=97))
    with pytest.raises(ConfigError, match=r"adapter can't be oft for layers of the class Conv1D, as transformer\.h\.0"):
        PeftAdapters(gpt2).add_own(section("oft"))


def test_blocks_of_oft_must_divide_what_they_turn() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.block_size must divide the 48 inputs of down_proj, got 32"):
        PeftAdapters(base()).add_own(section("oft", "adapter.block_size=32"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter=freeze", "quantization=bnb_nf4"], r"quantization can't be bnb_nf4 (if|with) adapter"),
        (["adapter=freeze", "quantization=fp8"], r"quantization can't be fp8 with adapter=freeze: its model is saved whole"),
        (["adapter=dora", "adapter.experts=true"], r"adapter\.experts must be false with adapter\.dora=true"),
    ],
)
def test_what_a_kind_can_not_go_with_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("train", ["data.path=x", *overrides])
