"""Which settings a stage reads, and that no other can be given."""

from __future__ import annotations

from typing import get_args

import pytest

from raytune_llm import ConfigError, load_config
from raytune_llm.config.stage import DPO_READS, SFT_READS, DPOLoss
from raytune_llm.losses.preference import PREFERENCE_LOSSES
from raytune_llm.stages.sft import LOSSES


def stage_of(*overrides: str):
    return load_config("train", ["data.path=rows.jsonl", *overrides]).stage


def test_it_is_known_of_every_loss_what_it_reads():
    assert set(SFT_READS) == set(LOSSES)
    assert set(DPO_READS) == set(get_args(DPOLoss)) <= set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage.eaft_alpha=2.0"], "stage.eaft_alpha is not read with stage.loss=cross_entropy, got 2.0. Leave it out, or set"),
        (["stage.loss=eaft", "stage.asft_alpha=0.1"], "or set stage.loss=asft."),
        (["stage.loss=dft", "stage.z_loss=1e-4"], "stage.z_loss is not read with stage.loss=dft, got 0.0001"),
        (["stage.loss=dft", "stage.label_smoothing=0.1"], "stage.label_smoothing is not read with stage.loss=dft"),
        (["stage.loss=eaft", "stage.eaft_alpha=null"], "stage.eaft_alpha must be a number with stage.loss=eaft, got 'null'"),
        (["stage=dpo", "stage.f_alpha=0.0"], "stage.f_alpha is not read with stage.loss=sigmoid, got 0.0"),
        (["stage=dpo", "stage.discopop_tau=0.1", "stage.loss={hinge:1,sft:1}"], "is not read with stage.loss=hinge+sft"),
        (["stage=dpo", "stage.label_smoothing=0.1", "stage.loss=ipo"], "or set stage.loss=sigmoid or robust or exo_pair or aot"),
        (["stage=dpo", "stage.loss={sigmoid:1,ipo:0}"], "stage.loss.ipo must be above 0, got 0.0. Leave out"),
        (["stage=dpo", "data.mask_history=true"], "data.mask_history is not read with stage=dpo, got True. Leave it out."),
        (["stage=kto", "data.train_on_prompt=true"], "data.train_on_prompt is not read with stage=kto"),
        (["stage=pretrain", "data=text", "data.default_system=Hi"], "data.default_system is not read with stage=pretrain"),
        (["stage=pretrain", "data=text", "data.overlong=drop"], "data.overlong is not read with stage=pretrain, got 'drop'"),
        (["stage=dpo", "stage.loss=sigmod"], "got 'sigmod'. Did you mean sigmoid?"),
        (
            ["adapter=none", "+adapter.rank=4"],
            "adapter.rank is no setting of adapter=none, got 4. It is one of adapter=dora, adapter=eva, adapter=loftq, "
            "adapter=lora, adapter=lora_plus, adapter=pissa, adapter=rslora, adapter=vera.",
        ),
        (
            ["+experiment=sft_qwen", "adapter=none"],
            "adapter.rank and adapter.alpha are no settings of adapter=none. "
            "They are of adapter=dora, adapter=eva, adapter=loftq, adapter=lora, "
            "adapter=lora_plus, adapter=pissa, adapter=rslora, adapter=vera. Where an "
            "experiment sets them, add ~adapter.rank ~adapter.alpha.",
        ),
        (["stage=orpo", "data.eval_fraction=0.1", "train.exact_match_rows=2"], "rows must be 0 with stage=orpo"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(overrides, said):
    with pytest.raises(ConfigError) as error:
        stage_of(*overrides)
    assert said in str(error.value)


def test_a_loss_finds_its_own_settings_alone():
    assert (stage_of("stage.loss=eaft").eaft_alpha, stage_of("stage.loss=eaft").asft_alpha) == (1.0, None)
    assert stage_of("stage=dpo").discopop_tau is None
    both = stage_of("stage=dpo", "stage.loss={discopop:0.5,f_alpha:0.5}", "stage.f_alpha=0.3")
    assert (both.discopop_tau, both.f_alpha) == (0.05, 0.3)


def test_texts_that_are_not_packed_may_be_dropped_for_their_length():
    load_config("train", ["data.path=a.txt", "data=text", "stage=pretrain", "data.packing=false", "data.overlong=drop"])
