"""Which back end runs, and that those that run here agree."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import current_flash_attention_impl
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.attention import BACKENDS, LACKS, Case, choose
from raytune_llm.models.attention.backends import with_sinks
from raytune_llm.models.attention.masked import Scores, masked_attention

GPU = Case(device_type="cuda", dtype=torch.bfloat16)
CPU = Case(device_type="cpu", dtype=torch.float32)


SINKS = torch.tensor([-1.0, 0.5, 2.0, 0.0])
"""A score a head."""


def one_layer():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (GPU, "varlen"),
        (CPU, "varlen"),
        (Case(device_type="cuda", dtype=torch.float32), "sdpa"),
        (Case(device_type="cuda", dtype=torch.bfloat16, capability=(7, 5)), "sdpa"),
        (Case(device_type="cuda", dtype=torch.bfloat16, head=512), "sdpa"),
        (Case(device_type="cuda", dtype=torch.bfloat16, softcap=True), "flex"),
        (Case(device_type="cpu", dtype=torch.float32, softcap=True), "varlen"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_that_can_run_and_says_why(case, backend):
    chosen, reason = choose("auto", case)
    assert chosen == backend
    assert reason


@pytest.mark.parametrize(
    ("asked", "case", "said"),
    [
        ("varlen", Case(device_type="cuda", dtype=torch.float32), "needs bf16 or fp16, this run computes in float32"),
        ("flex", CPU, "no backward pass on a CPU"),
        ("flash2", GPU, "not installed"),
        ("flash2", CPU, "needs a GPU"),
        ("flash3", GPU, "not installed"),
        ("flash3", Case(device_type="cuda", dtype=torch.bfloat16, capability=(8, 0)), "a Hopper GPU"),
        ("flash4", GPU, "not installed"),
        ("flash4", Case(device_type="cuda", dtype=torch.bfloat16, capability=(8, 0)), "Hopper or Blackwell GPU"),
        ("flash4", Case(device_type="cuda", dtype=torch.bfloat16, capability=(10, 0), head=256), "at most 128"),
        ("varlen", Case(device_type="cuda", dtype=torch.bfloat16, softcap=True), "has no softcap"),
    ],
    ids=str,
)
def test_a_back_end_asked_for_by_name_that_can_not_run_is_refused(asked, case, said):
    with pytest.raises(ConfigError, match=f"model.attention can't be {asked} here: .*{said}"):
        choose(asked, case)


def test_a_package_that_is_there_and_does_not_load_is_told_from_one_that_is_not(tmp_path, monkeypatch):
    """flash-attn-4 alone has a flash_attn, too, without what flash2 wants of it."""
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="the package flash-attn does not load"):
        choose("flash2", GPU)


FLASH_ATTENTION_3 = """
import torch

library = torch.library.Library("flash_attn_3", "DEF")
library.define("fwd(Tensor q, Tensor k, Tensor v) -> Tensor[]")
library.define("bwd(Tensor grad, Tensor q, Tensor k, Tensor v) -> Tensor[]")
"""


@pytest.fixture
def flash_attn_interface(tmp_path, monkeypatch):
    """A function that puts a package of this name and text where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "flash_attn_interface.py").write_text
    attention.tell_torch("varlen")
    sys.modules.pop("flash_attn_interface", None)
    vars(torch.ops).pop("flash_attn_3", None)


def test_auto_takes_flash_attention_3_on_hopper_where_it_is_installed(flash_attn_interface):
    flash_attn_interface(FLASH_ATTENTION_3)
    assert choose("auto", GPU) == ("flash3", "FlashAttention 3 is installed")
    assert choose("auto", replace(GPU, capability=(8, 0)))[0] == "varlen"
    assert choose("auto", replace(GPU, softcap=True))[0] == "flex"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no operator flash_attn_3.fwd"),
        ("raise OSError('libcudart.so.13')", "does not load .*libcudart"),
        ("raise RuntimeError('schema')", "does not load .*schema"),
    ],
)
def test_auto_passes_over_a_flash_attention_3_that_torch_can_not_call(flash_attn_interface, text, said):
    flash_attn_interface(text)
    assert choose("auto", GPU)[0] == "varlen"
    with pytest.raises(ConfigError, match=said):
        choose("flash3", GPU)


def test_a_model_that_calls_no_flash_attention_leaves_torch_the_one_that_another_takes(flash_attn_interface):
    flash_attn_interface(FLASH_ATTENTION_3)
    for backend, taken in {"flash3": "FA3", "flex": "FA3", "sdpa": "FA3", "varlen": None}.items():
        attention.attach(one_layer(), backend)
        assert current_flash_attention_impl() == taken


def test_names_of_back_ends_are_not_those_for_which_transformers_prepares_its_own():
    model = one_layer()
    for backend in set(BACKENDS) - {"flash3"}:
        attention.attach(model, backend)
        assert model.config._attn_implementation.startswith("raytune_")


def test_every_back_end_knows_what_it_lacks():
    assert BACKENDS.keys() == LACKS.keys()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (2.0, None), (None, SINKS)])
def test_a_document_at_a_time_is_masked_attention(window, softcap, sinks):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 16, 8) for heads in (4, 2, 2))
    of_scores = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    settings = {"cu_seqlens_S": torch.tensor([0, 3, 16, 29, 32]), "max_seqlen": 13, **of_scores}
    ours, _ = attention.varlen(nn.Identity(), query, key, value, None, **settings)
    plain, _ = attention.sdpa(nn.Identity(), query, key, value, None, **settings)
    assert torch.allclose(ours, plain, atol=1e-6)


def test_blocks_of_a_mask_are_masked_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 64, 16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 30, 64, 100, 128])
    for window in (None, 7):
        masks = attention.block_masks("flex", bounds, 2, 64, 7)
        ours, _ = attention.flex(nn.Identity(), query, key, value, None, sliding_window=window, softcap=2.0, **masks)
        plain, _ = attention.sdpa(
            nn.Identity(), query, key, value, None, cu_seqlens_S=bounds, max_seqlen=36, sliding_window=window, softcap=2.0
        )
        assert torch.allclose(ours, plain, atol=1e-5)


def test_sinks_take_their_part_after_attention_as_in_it():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 16, 8) for _ in range(3))
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    lse = (query @ key.mT / 8**0.5).masked_fill(~mask, -torch.inf).logsumexp(-1)
    plain = Scores(None, None, None)
    after = with_sinks(masked_attention(query, key, value, mask, plain), lse, SINKS)
    assert torch.allclose(after, masked_attention(query, key, value, mask, plain, SINKS[:, None]), atol=1e-6)


def test_gemma_2_is_known_by_its_capped_scores():
    config = AutoConfig.for_model("gemma2", head_dim=64)
    case = attention.case_of(config, "cpu", (0, 0), torch.float32)
    assert (case.softcap, case.head) == (True, 64)


def test_a_model_without_attention_is_a_case_too():
    assert attention.case_of(AutoConfig.for_model("mamba"), "cuda", (9, 0), torch.bfloat16).head > 0


def test_attention_with_sinks_is_not_done_by_kernels_that_have_none():
    case = attention.Case(device_type="cuda", dtype=torch.bfloat16, sinks=True)
    assert attention.choose("auto", case)[0] == "flex"
    with pytest.raises(ConfigError, match=r"model\.attention can't be flash2 here: .*no attention sinks"):
        attention.choose("flash2", case)


def test_compilers_are_told_how_what_attention_gives_on_a_cpu_lies_in_memory():
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    boundaries, no_prefixes = torch.tensor([0, 4, 6], dtype=torch.int32), (None, None, None, None, 0, 0)
    operator = torch.ops.raytune_llm.document_attention.default
    torch.library.opcheck(operator, (q, k, v, boundaries, 4, *no_prefixes, None), test_utils=("test_faketensor",))
