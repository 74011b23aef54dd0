"""Batch sizes, the number of steps, optimizer and schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raytune_llm.migrate.argument_rules import NoEffect, Refusal, Settings
from raytune_llm.migrate.rules.values import LATER


def clipping(
    max_grad_norm: float, optim: str, use_galore: bool, galore_layerwise: bool, use_apollo: bool, apollo_layerwise: bool
) -> Settings:
    """Where tensors step one by one, no gradient is left to be clipped, whatever max_grad_norm says."""
    layerwise = optim in ("lomo", "adalomo") or (use_galore and galore_layerwise) or (use_apollo and apollo_layerwise)
    return {"train.max_grad_norm": None if layerwise else max_grad_norm or None}


def batch_sizes(
    per_device_train_batch_size: int, gradient_accumulation_steps: int, ray_num_workers: int, world_size: int | None
) -> Settings:
    workers = world_size or ray_num_workers
    return {
        "train.micro_batch_size": per_device_train_batch_size,
        "train.global_batch_size": per_device_train_batch_size * gradient_accumulation_steps * workers,
    }


def epochs(num_train_epochs: float, max_steps: int, streaming: bool) -> Settings:
    if max_steps > 0:
        # There, max_steps alone says how long a run is. An epoch has a step or more; a stream has no epochs.
        return {"train.epochs": 1 if streaming else max_steps, "train.max_steps": max_steps}
    if not num_train_epochs > 0:
        raise Refusal("must be above 0", "num_train_epochs")
    return {"train.epochs": float(num_train_epochs), "train.max_steps": None}


ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_npu_fused")


BNB_8BIT = {"adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


UNSET: dict[str, Settings] = {
    "sgd": {"optimizer": "sgd", "optimizer.momentum": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "lomo": {"optimizer": "lomo"},
    "adalomo": {"optimizer": "adalomo"},
}
"""Optimizers that read no adam_ argument."""


SWITCHED = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""The first that is on wins, over optim too."""


def optimizer(
    optim: str,
    use_galore: bool,
    use_apollo: bool,
    use_badam: bool,
    use_adam_mini: bool,
    use_muon: bool,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
) -> Settings:
    """transformers' SGD has no momentum. Its Adafactor has the schedule's rate, not one of its own. AdaLomo is Adafactor relative
    to the weights, a tensor at a time, and LOMO so much of SGD."""
    switches = (use_galore, use_apollo, use_badam, use_adam_mini, use_muon)
    switched = next((name.removeprefix("use_") for name, on in zip(SWITCHED, switches, strict=True) if on), None)
    if switched is None and optim in UNSET:
        return UNSET[optim]
    betas = {"optimizer.beta1": adam_beta1, "optimizer.beta2": adam_beta2}
    if switched is None and optim in ("lion", "lion_32bit"):
        return {"optimizer": "lion", **betas}
    chosen = switched or _adam_of(optim)
    return {"optimizer": chosen, **betas, "optimizer.eps": adam_epsilon}


def _adam_of(optim: str) -> str:
    if optim in ADAMW:
        return "adamw"
    if optim in BNB_8BIT:
        return BNB_8BIT[optim]
    if optim == "schedule_free_adamw":
        return "schedule_free"
    if "q_galore" in optim:
        raise Refusal(f"{optim} has no package whose state can be saved; there are galore and apollo_mini", "optim")
    if optim.startswith(("galore", "apollo")):
        raise Refusal(f"{optim} {LATER} with optim_target_modules; use use_galore or use_apollo", "optim")
    raise Refusal(
        f"{optim} {LATER}; there are adamw_torch, adamw_8bit, adafactor, lion_32bit, schedule_free_adamw and sgd", "optim"
    )


def galore(
    use_galore: bool,
    galore_target: str | list[str],
    galore_rank: int,
    galore_update_interval: int,
    galore_scale: float,
    galore_proj_type: str,
    galore_layerwise: bool,
) -> Settings:
    if not use_galore:
        return {}
    _only("galore_target", galore_target, ("all", ["all"]), "every matrix of the layers is projected")
    _only("galore_proj_type", galore_proj_type, ("std",), "the shorter side is projected, as std does")
    return {**_projected(galore_rank, galore_update_interval, galore_scale), "optimizer.layerwise": galore_layerwise}


def apollo(
    use_apollo: bool,
    apollo_target: str | list[str],
    apollo_rank: int,
    apollo_update_interval: int,
    apollo_scale: float,
    apollo_proj: str,
    apollo_proj_type: str,
    apollo_scale_type: str,
    apollo_layerwise: bool,
    apollo_scale_front: bool,
) -> Settings:
    if not use_apollo:
        return {}
    _only("apollo_target", apollo_target, ("all", ["all"]), "every matrix of the layers is projected")
    _only("apollo_proj", apollo_proj, ("random",), "projections are random")
    _only("apollo_proj_type", apollo_proj_type, ("std",), "the shorter side is projected, as std does")
    _only("apollo_scale_front", apollo_scale_front, (False,), "the scale comes after the limit of the norm's growth")
    own = {"optimizer.sizes": apollo_scale_type, "optimizer.layerwise": apollo_layerwise}
    return {**_projected(apollo_rank, apollo_update_interval, apollo_scale), **own}


def _projected(rank: int, update_every: int, scale: float) -> Settings:
    return {"optimizer.rank": rank, "optimizer.update_every": update_every, "optimizer.scale": float(scale)}


def badam(
    use_badam: bool, badam_mode: str, badam_start_block: int | None, badam_switch_mode: str, badam_switch_interval: int
) -> Settings:
    if not use_badam:
        return {}
    ratio = "blocks are layers; a random part of every matrix (ratio) saves no gradients, and no paper has measured it"
    _only("badam_mode", badam_mode, ("layer",), ratio)
    _only("badam_start_block", badam_start_block, (None,), "the order says which block is first")
    never = "blocks take turns; one that never changes is adapter=freeze with adapter.layers=[NUMBER]"
    _only("badam_switch_mode", badam_switch_mode, ("ascending", "descending", "random"), never)
    if badam_switch_interval < 1:
        raise Refusal(f"must be at least 1: {never}", "badam_switch_interval")
    return {"optimizer.switch_every": badam_switch_interval, "optimizer.order": badam_switch_mode}


def _only(argument: str, value: Any, taken: tuple[Any, ...], why: str) -> None:
    if value not in taken:
        raise Refusal(f"must be {str(taken[0]).lower()} here: {why}", argument)


def schedule(lr_scheduler_type: str, lr_scheduler_kwargs: Mapping[str, Any] | str | None, learning_rate: float) -> Settings:
    given = json.loads(lr_scheduler_kwargs) if isinstance(lr_scheduler_kwargs, str) else dict(lr_scheduler_kwargs or {})
    match lr_scheduler_type:
        case "linear":
            chosen: dict[str, Any] = {"schedule": "linear"}
        case "constant" | "constant_with_warmup":
            chosen = {"schedule": "constant"}
        case "cosine" | "cosine_with_restarts":
            once = 0.5 if lr_scheduler_type == "cosine" else 1
            if given.pop("num_cycles", once) != once:
                raise Refusal("several cycles are not here", "lr_scheduler_kwargs")
            chosen = {"schedule": "cosine", "schedule.floor": 0.0}
        case "cosine_with_min_lr":
            if "min_lr" not in given and "min_lr_rate" not in given:
                raise Refusal("must hold min_lr or min_lr_rate", "lr_scheduler_kwargs")
            floor = given.pop("min_lr") / learning_rate if "min_lr" in given else given.pop("min_lr_rate")
            chosen = {"schedule": "cosine", "schedule.floor": float(floor)}
        case "inverse_sqrt":
            chosen = {"schedule": "inverse_sqrt", "schedule.timescale": given.pop("timescale", None)}
        case "polynomial":
            power, lr_end = float(given.pop("power", 1.0)), float(given.pop("lr_end", 1e-7))
            chosen = {"schedule": "polynomial", "schedule.power": power, "schedule.lr_end": lr_end}
        case "warmup_stable_decay":
            floor = float(given.pop("min_lr_ratio", 0.0))
            chosen = {"schedule": "wsd", "schedule.decay_ratio": None, "schedule.floor": floor}
        case other:
            raise Refusal(f"the schedule {other} {LATER}", "lr_scheduler_type")
    if given:
        raise Refusal(f"{', '.join(given)} of {lr_scheduler_type} can't be set here", "lr_scheduler_kwargs")
    return chosen


def warmup(lr_scheduler_type: str, warmup_steps: float, warmup_ratio: float | None) -> Settings | NoEffect:
    if lr_scheduler_type == "constant":
        return {"schedule.warmup_ratio": 0.0, "schedule.warmup_steps": None}
    if warmup_steps and warmup_ratio:
        raise Refusal(
            "can't be combined with warmup_ratio: which of the two counts depends on the version of transformers", "warmup_steps"
        )
    if warmup_steps >= 1:
        return {"schedule.warmup_ratio": None, "schedule.warmup_steps": int(warmup_steps)}
    return {"schedule.warmup_ratio": float(warmup_ratio or warmup_steps), "schedule.warmup_steps": None}
