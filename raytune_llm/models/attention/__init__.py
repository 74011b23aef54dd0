"""Attention within documents: the back ends, how one is chosen, and how a model calls it.

A model passes the batch's boundaries, cu_seqlens_S and max_seqlen, through to every layer. No back end lets a token see another
document; a back end that can't guarantee this is not in the list. If documents share a prompt, the batch's prefixes
come along, to the back ends that know what to make of them (PREFIXED).
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
"""Back ends that call torch's FlashAttention, and whose kernels it is then to take in place of its own, by its name for them."""
PREFIXED = {"varlen", "flash3", "flex", "sdpa"}
"""Back ends that support prompt sharing."""
BLOCK_MASKED = {"flex"}
"""Back ends that take block masks, built once a batch, beside the boundaries."""
BY_ITSELF = ("varlen", "sdpa", "flex")
"""What auto chooses: the first that can run. Before them, on Hopper GPUs (sm_90), FlashAttention 3;
other packages are taken where they are asked for. FlexAttention comes last, and so for capped scores alone (_order): else what
varlen leaves is float32, for which torch (2.13) computes its backward pass in tiles of 16 by 16, a head_dim above 256,
for which it has no tiles of their own, and GPUs that it does not run on."""

WITH_SINKS = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
"""Architectures, by model_type, whose heads have attention sinks."""

DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Names that configs of models have for the part of attention's weights that is dropped in training."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What attention is to run on and with."""

    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] = (9, 0)
    """Compute capability of a CUDA device."""
    head: int = 128
    """head_dim."""
    softcap: bool = False
    """Scores are capped, as in Gemma 2."""
    sinks: bool = False
    """Heads have a learnt score beside those of the keys, as in gpt-oss."""


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
    """What the config has of dropout in attention, which no back end applies: FlashAttention over boundaries knows none."""
    text: Any = config.get_text_config()
    return max(getattr(text, name, None) or 0.0 for name in DROPOUT)


def capability_of(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) of another device."""
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
    """Early releases called their kernels by themselves; torch calls them as operators."""
    missing = [name for name in ("fwd", "bwd") if not hasattr(torch.ops.flash_attn_3, name)]
    return f"the package flash_attn_interface has no operator flash_attn_3.{missing[0]}" if missing else None


def _flash4_lacks(case: Case) -> str | None:
    if case.capability[0] not in (9, 10):
        return "FlashAttention 4 needs a Hopper or Blackwell GPU (compute capability 9 or 10)"
    if case.capability[0] == 10 and case.head > 128:
        return f"FlashAttention 4 takes heads of at most 128 numbers on this GPU, these have {case.head}"
    return _flash_lacks(case, name="FlashAttention 4") or _import_lacks("flash-attn-4", "flash_attn.cute")


def _import_lacks(package: str, module: str) -> str | None:
    """A package may be there and not load: built for another torch, lacking a library, or under a name that another has too."""
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
    ("varlen", "cuda"): "torch's own FlashAttention over document boundaries",
    ("varlen", "cpu"): "a document at a time, on the CPU",
    ("flex", "cuda"): "blocks of a mask",
    ("sdpa", "cuda"): "a mask of every pair of positions",
}


def choose(asked: str, case: Case) -> tuple[str, str]:
    """The back end to run and the reason for it. Raises ConfigError where one that was asked for by name can't run."""
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
    """The choice for a model that computes a row in a line of its own, by transformers' layers as they are, and its reason."""
    if asked != "auto":
        raise ConfigError(
            "model.attention",
            f"must be auto for {config.model_type}, whose own layers compute a row in a line for itself",
            got=asked,
            fix="Set model.attention=auto.",
        )
    return "transformers", f"the own layers of {config.model_type}, a row in a line for itself"


def _order(case: Case) -> tuple[str, ...]:
    if case.softcap or case.sinks:
        return "varlen", "flex", "sdpa"
    return ("flash3", *BY_ITSELF) if _is_hopper(case) else BY_ITSELF


def _is_hopper(case: Case) -> bool:
    return case.device_type == "cuda" and case.capability[0] == 9


def expected(asked: str, case: Case) -> str:
    """What will run in this case, on a device that need not be here."""
    return choose(asked, case)[0] if asked == "auto" else asked


def attach(model: PreTrainedModel, backend: str) -> None:
    """Let the model's layers call the back end, for packs and over a cache.

    Raises ConfigError for a model that has more than them to take something from token to token."""
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
    """Have torch take the kernels that the back end wants of it: a setting of the process, which its models share.

    A model whose back end calls none of them leaves it as it is. `varlen` and `flash3` don't meet in a run: where one can run,
    auto takes the same for all of its models.
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
    """Whether documents can share a prompt: the back end supports it, and every layer of the model attends to all
    that came before, not at a window of it or at a state that is carried on. On every device the same, so that runs are."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return attends_to_all(config) and not capped and (asked == "auto" or asked in PREFIXED)


def attends_to_all(config: PretrainedConfig) -> bool:
    """Whether each layer is attention to all that came before, by a back end of ours, without sinks."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if text.model_type in (*ONE_ROW_A_LINE, *WITH_SINKS) or computes_by_itself(config):
        return False
    return kinds == {"full_attention"} and getattr(text, "sliding_window", None) is None


def check_groups(config: PretrainedConfig, group_tokens: int, max_length: int) -> None:
    """Raises ConfigError where S2 attention would change nothing, or what layers do beside it is not known to suit it."""
    setting = "model.shift_attn_tokens"
    if not attends_to_all(config):
        rule = f"must be null for {config.model_type}: not each of its layers attends to all that came before"
        raise ConfigError(setting, rule, got=group_tokens, fix="Leave it out.")
    if group_tokens >= max_length:
        rule = f"must be below data.max_length, which is {max_length}: a row would be one group"
        raise ConfigError(setting, rule, got=group_tokens, fix="Set a quarter of data.max_length, or null.")


def arguments(backend: str, batch: Batch, window: int | None, group_tokens: int | None = None) -> dict[str, Any]:
    """The keyword arguments that the layers pass to a back end, for one batch. window: tokens of a sliding window.
    group_tokens: of S2 attention."""
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
    """The arguments that only some back ends take, by name. They are built once per batch."""
    if backend not in BLOCK_MASKED:
        return {}
    return {"block_masks": documents.block_masks(cu_seqlens_S, B, T, window, prefixes)}


def _stable(cu_seqlens_S: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """The boundaries in a form for which compiled layers are not compiled again at each batch.

    The number of boundaries is marked as dynamic. max_seqlen, which FlashAttention takes as an upper bound, is rounded up to a
    power of two of at least 1,024, so that it has few values; blocks past a document's end return at once (0.3% of a step).
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
