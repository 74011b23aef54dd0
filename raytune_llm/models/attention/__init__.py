"""Attention within documents: the back ends, how one is chosen, and how a model calls it.

The model passes the document boundaries of the batch (cu_seqlens_S and max_seqlen) to every layer. In every back end of the list,
a token attends only to its own document. If documents share a prompt, the batch also has prefixes, which only the back ends in
PREFIXED support.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.attention import documents
from raytune_llm.models.attention.backends import flash2, flash3, flash4, flex, note_windows_in_masks, sdpa, varlen
from raytune_llm.models.attention.groups import group_bounds
from raytune_llm.models.attention.isolation import ONE_ROW_A_LINE, check_isolation, computes_by_itself, needs_lines
from raytune_llm.models.layers import largest
from raytune_llm.models.multimodal import text_model
from raytune_llm.records import Batch, Prefixes

BACKENDS: dict[str, Callable] = {
    "varlen": varlen,
    "flash2": flash2,
    "flash3": flash3,
    "flash4": flash4,
    "flex": flex,
    "sdpa": sdpa,
}
IN_TORCH: dict[str, str | None] = {"varlen": None, "flash3": "FA3"}
"""Back ends that call torch's FlashAttention -> torch's name of the kernels to use instead of its own; None: its own."""
PREFIXED = {"varlen", "flash3", "flex", "sdpa"}
"""Back ends that support prompt sharing."""
BLOCK_MASKED = {"flex"}
"""Back ends that also need block masks, which are built once per batch."""
BY_ITSELF = ("varlen", "sdpa", "flex")
"""`auto` takes the first of these that can run. On Hopper GPUs (sm_90) it tries FlashAttention 3 before them. Other packages are
used only if the setting names them. FlexAttention is last because, except for softcap (see _order), it is slow where varlen can't
run: in float32 its backward pass has tiles of 16 x 16 (torch 2.13), and above a head_dim of 256 it has no tuned tiles."""

WITH_SINKS = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
"""Architectures, by model_type, whose heads have attention sinks."""

DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""The names by which models' configs call the dropout probability of attention weights."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The device, dtype and model properties on which the choice of a back end depends."""

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] = (9, 0)
    """Compute capability of a CUDA device."""
    head: int = 128
    """head_dim."""
    softcap: bool = False
    """Attention scores have a softcap, as in Gemma 2."""
    sinks: bool = False
    """Heads have attention sinks: one learned score beside those of the keys, as in gpt-oss."""


def case_of(config: PretrainedConfig, device_type: str, capability: tuple[int, int], dtype: torch.dtype) -> Case:
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return Case(
        device_type=device_type,
        dtype=dtype,
        capability=capability,
        head=largest(text, "head_dim") or (text.hidden_size // heads if heads else Case.head),  # Mamba has none
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        sinks=text.model_type in WITH_SINKS,
    )


def dropout_of(config: PretrainedConfig) -> float:
    """The attention dropout probability in the model's config. No back end applies it, since FlashAttention's varlen functions
    have none."""
    text: Any = config.get_text_config()
    return max(getattr(text, name, None) or 0.0 for name in DROPOUT)


def capability_of(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability; (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _flash_lacks(case: Case, *, name: str) -> str | None:
    if case.device_type != "cuda":
        return f"{name} needs a GPU"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"{name} needs bf16 or fp16, this run computes in {str(case.dtype).removeprefix('torch.')}"
    if case.sinks:
        return f"{name} has no attention sinks"
    if case.capability < (8, 0):
        return f"{name} needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    if case.head > 256 or case.head % 8:
        return f"{name} needs a head_dim of at most 256 and a multiple of 8, this model has {case.head}"
    return None


def _varlen_lacks(case: Case) -> str | None:
    if case.device_type != "cuda":
        return None
    return _capping_lacks(case) or _flash_lacks(case, name="FlashAttention")


def _capping_lacks(case: Case) -> str | None:
    return "torch's FlashAttention has no softcap" if case.softcap else None


def _flash2_lacks(case: Case) -> str | None:
    return _flash_lacks(case, name="FlashAttention 2") or _import_lacks("flash-attn", "flash_attn.flash_attn_interface")


def _flash3_lacks(case: Case) -> str | None:
    if not _is_hopper(case):
        return "FlashAttention 3 needs a Hopper GPU (sm_90)"
    lacking = _capping_lacks(case) or _flash_lacks(case, name="FlashAttention 3")
    return lacking or _import_lacks("flash_attn_interface", "flash_attn_interface") or _operators_lack()


def _operators_lack() -> str | None:
    """Why torch can't call this release of FlashAttention 3, whose early releases did not register operators."""
    missing = [name for name in ("fwd", "bwd") if not hasattr(torch.ops.flash_attn_3, name)]
    return f"the package flash_attn_interface has no operator flash_attn_3.{missing[0]}" if missing else None


def _flash4_lacks(case: Case) -> str | None:
    if case.capability[0] not in (9, 10):
        return "FlashAttention 4 needs a Hopper or Blackwell GPU (compute capability 9 or 10)"
    if case.capability[0] == 10 and case.head > 128:
        return f"FlashAttention 4 needs a head_dim of at most 128 on this GPU, this model has {case.head}"
    return _flash_lacks(case, name="FlashAttention 4") or _import_lacks("flash-attn-4", "flash_attn.cute")


def _import_lacks(package: str, module: str) -> str | None:
    """Why the module can't be imported. An installed package may fail to load: built for another torch, or without a library."""
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        there = find_spec(module.partition(".")[0]) is not None
        return f"the package {package} {f'does not load ({error})' if there else 'is not installed'}"
    return None


def _flex_lacks(case: Case) -> str | None:
    if case.device_type != "cuda":
        return "FlexAttention has no backward pass on a CPU"
    if case.capability < (8, 0):
        return f"FlexAttention needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    return None


def _sdpa_lacks(case: Case) -> str | None:
    return None


LACKS: dict[str, Callable[[Case], str | None]] = {
    "varlen": _varlen_lacks,
    "flash2": _flash2_lacks,
    "flash3": _flash3_lacks,
    "flash4": _flash4_lacks,
    "flex": _flex_lacks,
    "sdpa": _sdpa_lacks,
}
"""Back end -> function that returns why it can't be used, or None."""
WHAT = {
    ("flash3", "cuda"): "FlashAttention 3 is installed",
    ("varlen", "cuda"): "torch's FlashAttention over document boundaries",
    ("varlen", "cpu"): "one document after another, on the CPU",
    ("flex", "cuda"): "with a block mask",
    ("sdpa", "cuda"): "with a full mask",
}


def choose(asked: str, case: Case) -> tuple[str, str]:
    """The back end to use, and the reason for the log. Raises ConfigError if `asked` names one that can't run here."""
    if asked != "auto":
        lacking = LACKS[asked](case)
        if lacking is not None:
            raise ConfigError("model.attention", f"can't be {asked} here: {lacking}", got=asked, fix="Set model.attention=auto.")
        return asked, "asked for"
    order = _order(case)
    lacks = {name: LACKS[name](case) for name in order}
    backend = next(name for name in order if lacks[name] is None)
    passed_over = [lacking for name in order[: order.index(backend)] if (lacking := lacks[name]) is not None]
    return backend, "; ".join([*passed_over, WHAT.get((backend, case.device_type), "")])


def own_layers(asked: str, config: PretrainedConfig) -> tuple[str, str]:
    """The choice, and its reason, for a model that runs with transformers' own layers, unpacked: one row of data per batch
    row."""
    if asked != "auto":
        raise ConfigError(
            "model.attention",
            f"must be auto for {config.model_type}, which runs with transformers' own layers and unpacked rows",
            got=asked,
            fix="Set model.attention=auto.",
        )
    return "transformers", f"{config.model_type}'s own layers, with unpacked rows"


def _order(case: Case) -> tuple[str, ...]:
    if case.softcap or case.sinks:
        return "varlen", "flex", "sdpa"
    return ("flash3", *BY_ITSELF) if _is_hopper(case) else BY_ITSELF


def _is_hopper(case: Case) -> bool:
    return case.device_type == "cuda" and case.capability[0] == 9


def expected(asked: str, case: Case) -> str:
    """A description of the back end that will run. The device of the case need not be in this machine."""
    return choose(asked, case)[0] if asked == "auto" else asked


def attach(model: PreTrainedModel, backend: str) -> None:
    """Make the model's layers call the back end, both for packs and with a KV cache.

    Raises ConfigError for a model in which other layers than attention carry information between tokens."""
    check_isolation(model.config, type(model))
    if needs_lines(model.config, type(model)):
        rule = f"must have a config of its own in its code, which computes attention ({type(model).__name__})"
        raise ConfigError("model.path", rule, got=model.config.name_or_path, fix="Add AutoConfig to auto_map.")
    tell_torch(backend)
    # Where a name says flash, transformers prepares its own FlashAttention; where it says sdpa, a model may have none.
    name = f"raytune_{backend.replace('flash', 'fa').replace('sdpa', 'masked')}"
    AttentionInterface.register(name, BACKENDS[backend])
    text: Any = text_model(model)
    text.set_attn_implementation(name)
    note_windows_in_masks(model)


def tell_torch(backend: str) -> None:
    """Select the kernels that torch's FlashAttention uses. This is global state of the process, shared by all its models.

    Back ends that don't call torch's FlashAttention change nothing. One run never has both `varlen` and `flash3`: `auto` takes
    the same back end for all models of a run.
    """
    if backend not in IN_TORCH or IN_TORCH[backend] == current_flash_attention_impl():
        return
    wanted = IN_TORCH[backend]
    if wanted is None:
        restore_flash_attention_impl()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that these are overridden
        activate_flash_attention_impl(wanted)


def shares_prefixes(asked: str, config: PretrainedConfig) -> bool:
    """Whether documents can share a prompt: the back end supports it, and every layer has full attention, with no sliding window
    and no recurrent state. The answer does not depend on the device, so that runs are reproducible on others."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return attends_to_all(config) and not capped and (asked == "auto" or asked in PREFIXED)


def attends_to_all(config: PretrainedConfig) -> bool:
    """Whether every layer is full causal attention by one of our back ends, without sliding windows or sinks."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if text.model_type in (*ONE_ROW_A_LINE, *WITH_SINKS) or computes_by_itself(config):
        return False
    return kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None


def check_groups(config: PretrainedConfig, group_tokens: int, max_length: int) -> None:
    """Raises ConfigError if S2 attention would have no effect, or if the model has layers other than full attention."""
    setting = "model.shift_attn_tokens"
    if not attends_to_all(config):
        rule = f"must be null for {config.model_type}: not all of its layers have full attention"
        raise ConfigError(setting, rule, got=group_tokens, fix="Leave it out.")
    if group_tokens >= max_length:
        rule = f"must be below data.max_length, which is {max_length}, or each row would be one group"
        raise ConfigError(setting, rule, got=group_tokens, fix="Set a quarter of data.max_length, or null.")


def arguments(backend: str, batch: Batch, window: int | None, group_tokens: int | None = None) -> dict[str, Any]:
    """The keyword arguments that the layers pass to a back end, for one batch.

    window: the size of the sliding window in tokens. group_tokens: the size of S2 attention's groups in tokens."""
    B, T = batch.ids_BT.shape
    if group_tokens is not None:
        assert batch.prefixes is None, "config/rules.py lets no documents share a prompt"
        plain, shifted = (_of_groups(backend, batch, window, group_tokens, shifted=shifted) for shifted in (False, True))
        return {**plain, "shifted": shifted}
    cu_seqlens_S, max_seqlen = _stable(batch.cu_seqlens_S, batch.max_seqlen)
    return {
        "cu_seqlens_S": cu_seqlens_S,
        "max_seqlen": max_seqlen,
        "prefixes": _stable_prefixes(batch.prefixes),
        **block_masks(backend, batch.cu_seqlens_S, B, T, window, batch.prefixes),
    }


def _of_groups(backend: str, batch: Batch, window: int | None, group_tokens: int, *, shifted: bool) -> dict[str, Any]:
    B, T = batch.ids_BT.shape
    bounds_K = group_bounds(batch.cu_seqlens_S, B * T, group_tokens, shifted=shifted)
    cu_seqlens_S, max_seqlen = _stable(bounds_K, min(batch.max_seqlen, group_tokens))
    return {
        "cu_seqlens_S": cu_seqlens_S,
        "max_seqlen": max_seqlen,
        "prefixes": None,
        **block_masks(backend, bounds_K, B, T, window),
    }


def block_masks(
    backend: str, cu_seqlens_S: Tensor, B: int, T: int, window: int | None, prefixes: Prefixes | None = None
) -> dict[str, Any]:
    """{"block_masks": masks} for the back ends that need them, else {}. Built once per batch."""
    if backend not in BLOCK_MASKED:
        return {}
    return {"block_masks": documents.block_masks(cu_seqlens_S, B, T, window, prefixes)}


def _stable(cu_seqlens_S: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """The boundaries in a form that does not make torch.compile recompile the layers for each batch.

    The number of boundaries is marked as dynamic. max_seqlen is only an upper bound for FlashAttention, so it is rounded up to a
    power of two of at least 1,024, which leaves few values. Blocks past a document's end return at once.
    """
    torch._dynamo.maybe_mark_dynamic(cu_seqlens_S, 0)
    return cu_seqlens_S, max(1 << (max_seqlen - 1).bit_length(), 1024)


def _stable_prefixes(prefixes: Prefixes | None) -> Prefixes | None:
    """`_stable` for shared prompts."""
    if prefixes is None:
        return None
    queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys = prefixes
    for tensor in (queries_Q, keys_K):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    cu_queries_X, max_queries = _stable(cu_queries_X, max_queries)
    cu_keys_X, max_keys = _stable(cu_keys_X, max_keys)
    return Prefixes(queries_Q, keys_K, cu_queries_X, cu_keys_X, max_queries, max_keys)
