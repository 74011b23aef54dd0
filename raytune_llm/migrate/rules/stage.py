"""The stage and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytune_llm.migrate.argument_rules import NoEffect, Refusal, Settings
from raytune_llm.migrate.rules.values import LATER, listed

STAGES: Mapping[str, str] = {"sft": "sft", "pt": "pretrain", "rm": "reward", "kto": "kto"}


PAIR_STAGES: Mapping[str, str] = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
"""What stage=dpo is, by its pref_loss."""


def stage(stage: str, pref_loss: str) -> Settings:
    if stage == "dpo":
        if pref_loss not in PAIR_STAGES:
            hint = "; set stage=kto" if pref_loss == "kto_pair" else ""
            raise Refusal(f"must be one of {', '.join(PAIR_STAGES)}{hint}", "pref_loss")
        return {"stage": PAIR_STAGES[pref_loss]}
    if stage not in STAGES:
        raise Refusal(f"{stage} {LATER}; there are {', '.join(STAGES)} and dpo", "stage")
    return {"stage": STAGES[stage]}


def token_loss(
    stage: str,
    finetuning_type: str,
    adapter_name_or_path: str | Sequence[str] | None,
    use_dft_loss: bool,
    use_eaft_loss: bool,
    eaft_alpha: float,
    use_asft_loss: bool,
    asft_alpha: float,
    label_smoothing_factor: float,
    neftune_noise_alpha: float | None,
) -> Settings | NoEffect:
    """There, dft counts before eaft, and eaft before asft."""
    for_sft = {
        "use_dft_loss": use_dft_loss,
        "use_eaft_loss": use_eaft_loss,
        "use_asft_loss": use_asft_loss,
        "label_smoothing_factor": label_smoothing_factor,
        "neftune_noise_alpha": neftune_noise_alpha,
    }
    if stage != "sft":
        if wanted := [name for name, value in for_sft.items() if value]:
            raise Refusal(f"stage={stage} has none here", wanted[0])
        return NoEffect(f"is not read with stage={stage}")
    losses = ("dft", "eaft", "asft")
    loss = next((name for name in losses if for_sft[f"use_{name}_loss"]), "cross_entropy")
    if loss == "asft" and (finetuning_type != "lora" or adapter_name_or_path is not None):
        raise Refusal("asft needs a new LoRA adapter: its reference is the model without it", "use_asft_loss")
    return {
        "stage.loss": loss,
        **{"eaft": {"stage.eaft_alpha": float(eaft_alpha)}, "asft": {"stage.asft_alpha": float(asft_alpha)}}.get(loss, {}),
        "stage.label_smoothing": float(label_smoothing_factor),
        "stage.neftune_alpha": neftune_noise_alpha or None,
    }


def trained_turns(stage: str, train_on_prompt: bool, mask_history: bool) -> Settings | NoEffect:
    if stage != "sft":
        return NoEffect(f"is not read with stage={stage}")
    return {"data.train_on_prompt": train_on_prompt, "data.mask_history": mask_history}


def routers(stage: str, moe_aux_loss_coef: float | None) -> Settings | NoEffect:
    if stage in ("sft", "pt"):
        return {"stage.router_aux_loss_coef": moe_aux_loss_coef or None}
    if moe_aux_loss_coef:
        raise Refusal(f"stage={stage} has none here", "moe_aux_loss_coef")
    return NoEffect(f"is not read with stage={stage}")


def preference(
    stage: str,
    pref_loss: str,
    pref_beta: float,
    pref_ftx: float,
    pref_bco_weight: float,
    dpo_label_smoothing: float,
    simpo_gamma: float,
    ld_alpha: float | None,
    kto_chosen_weight: float,
    kto_rejected_weight: float,
) -> Settings | NoEffect:
    """With TRL 0.20 and later, LLaMA-Factory computes sigmoid for hinge and ipo too. Here they are what they are called."""
    beta = {"stage.beta": float(pref_beta)}
    if stage == "kto":
        return {
            **beta,
            "stage.desirable_weight": float(kto_chosen_weight),
            "stage.undesirable_weight": float(kto_rejected_weight),
            "stage.sft_weight": float(pref_ftx),
        }
    if stage != "dpo":
        return NoEffect(f"is not read with stage={stage}")
    if pref_loss in ("orpo", "simpo"):
        for_dpo = {"pref_ftx": pref_ftx, "pref_bco_weight": pref_bco_weight, "ld_alpha": ld_alpha}
        if unknown := [name for name, value in for_dpo.items() if value]:
            raise Refusal(f"{pref_loss} has none here", unknown[0])
        return beta if pref_loss == "orpo" else {**beta, "stage.gamma": float(simpo_gamma)}
    share = 1 / (1 + pref_bco_weight)
    return {
        **beta,
        "stage.loss": {pref_loss: share, "bco_pair": 1 - share} if pref_bco_weight else pref_loss,
        "stage.label_smoothing": float(dpo_label_smoothing),
        "stage.sft_weight": float(pref_ftx),
        "stage.ld_alpha": ld_alpha,
    }


def reference(
    stage: str,
    pref_loss: str,
    ref_model: str | None,
    ref_model_adapters: str | Sequence[str] | None,
    ref_model_quantization_bit: int | None,
) -> Settings | NoEffect:
    if stage != "kto" and not (stage == "dpo" and PAIR_STAGES.get(pref_loss) == "dpo"):
        return NoEffect("the stage has no reference")
    if ref_model is None:
        return {"stage.reference_model": None, "stage.reference_adapter": None}
    if ref_model_quantization_bit is not None:
        raise Refusal("a reference model is not quantized; leave it out", "ref_model_quantization_bit")
    adapters = [] if ref_model_adapters is None else listed(ref_model_adapters)
    if len(adapters) > 1:
        raise Refusal("a reference has one adapter; merge the others with `export`", "ref_model_adapters")
    return {"stage.reference_model": ref_model, "stage.reference_adapter": adapters[0] if adapters else None}
