from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raytune_llm import api, load_config
from raytune_llm.commands import plan as command
from raytune_llm.data import pipeline
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.memory.model import STATES
from raytune_llm.runs import plan as plan_module
from raytune_llm.runs import preflight
from raytune_llm.runs.plan import GIB, Device, Plan
from raytune_llm.runs.workspace import Workspace
from tests.runs import tiny_run

LLAMA3_8B = [
    "model.config.hidden_size=4096",
    "model.config.intermediate_size=14336",
    "model.config.num_hidden_layers=32",
    "model.config.num_attention_heads=32",
    "model.config.num_key_value_heads=8",
    "+model.config.vocab_size=128256",
    "model.config.max_position_embeddings=8192",
    "data.max_length=8192",
    "train.precision=bf16",
]
MIXTURE = [
    "model.config.model_type=qwen3_moe",
    "+model.config.moe_intermediate_size=64",
    "+model.config.num_experts=4",
]
TINY_MLP = ["model.config.hidden_size=36", "model.config.intermediate_size=38", "model.config.num_attention_heads=2"]
OWN_PRODUCTS = {torch.ops.raytune_llm.accumulate_product: lambda into, left, right, **out: 2 * left[0] * left[1] * right[1]}
EAGER = ["train.compile=false", "train.activation_checkpointing=none"]


def planned(chat_rows: str, cache: Any, tmp_path: Any, *overrides: str) -> Plan:
    return api.plan(tiny_run(chat_rows, str(cache), tmp_path / "out", *overrides))


def on(monkeypatch: pytest.MonkeyPatch, *gib: int) -> None:
    """A machine with GPUs of these sizes."""
    monkeypatch.setattr(plan_module, "gpus_here", lambda: [Device(name=f"GPU of {size}", memory=size * GIB) for size in gib])


def test_steps_are_unknown_before_the_data_are_prepared_and_nothing_is_written(chat_rows, tmp_path):
    assert planned(chat_rows, tmp_path / "cache", tmp_path).data is None
    assert list(tmp_path.iterdir()) == []


def test_steps_of_prepared_data_are_those_that_training_takes(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path / "out")
    pipeline.prepare(run.model, run.data, run.resources)
    data = api.plan(run).data
    result = api.train(run)
    assert data is not None
    assert data.total_steps == result.summary.steps
    assert 2 * data.tokens == result.summary.tokens
    assert (data.rows, data.held_out_rows) == (55, 6)


def test_packs_are_as_full_as_their_tokens(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path / "out")
    pipeline.prepare(run.model, run.data, run.resources)
    data = api.plan(run).data
    assert data is not None
    assert data.fill == pytest.approx(data.tokens / (data.samples * 256))
    assert planned(chat_rows, cache, tmp_path, "data.packing=false").data.fill is None  # type: ignore[union-attr]


def test_missing_data_are_an_error_as_in_training(cache, tmp_path):
    with pytest.raises(DataError):
        planned("no/such/rows.jsonl", cache, tmp_path)


def test_a_model_that_is_not_there_is_an_error_as_in_training(chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        planned(chat_rows, cache, tmp_path, f"model.path={tmp_path}", "model.weights=pretrained")


def test_auto_takes_a_worker_for_each_gpu(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 80, 80, 80, 80)
    plan = planned(chat_rows, cache, tmp_path, "resources=local")
    assert (plan.world_size, plan.accumulation) == (4, 2)


def test_a_batch_that_the_workers_can_not_share_is_an_error(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 80, 80, 80)
    with pytest.raises(ConfigError, match=r"x workers = 1 x 3, got 8\. Set it to 9"):
        planned(chat_rows, cache, tmp_path, "resources=local")


def test_a_run_that_fits_needs_no_mending(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 24)
    plan = planned(chat_rows, cache, tmp_path)
    assert plan.memory.total < GIB
    assert plan.misfits == ()


def test_recomputation_mends_a_long_context(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 40)
    plan = planned(chat_rows, cache, tmp_path, *LLAMA3_8B, *EAGER)
    (misfit,) = plan.misfits
    assert [fix.settings for fix in misfit.fixes] == [("train.activation_checkpointing=full",)]


def test_auto_recomputes_no_more_than_a_gpu_needs(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 80, 40, 24, 16)
    plan = planned(chat_rows, cache, tmp_path, *LLAMA3_8B)
    assert [verdict.checkpointing for verdict in plan.verdicts] == ["none", "selective", "full", "offload"]
    assert [verdict.fits for verdict in plan.verdicts] == [True, True, True, False]


def test_layers_that_are_not_compiled_are_never_recomputed_in_part(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 40)
    (verdict,) = planned(chat_rows, cache, tmp_path, *LLAMA3_8B, "train.compile=false").verdicts
    assert verdict.checkpointing == "full"


def test_four_bits_mend_what_recomputation_does_not(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 16)
    (misfit,) = planned(chat_rows, cache, tmp_path, *LLAMA3_8B).misfits
    assert ("quantization=bnb_nf4",) in [fix.settings for fix in misfit.fixes]


def test_full_fine_tuning_is_mended_by_an_adapter_or_by_shards(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, *[80] * 8)
    plan = planned(chat_rows, cache, tmp_path, *LLAMA3_8B, "resources=local", "adapter=none", *EAGER)
    (misfit,) = plan.misfits
    sets = [set(fix.settings) for fix in misfit.fixes]
    assert {"adapter=lora"} in sets
    assert {"strategy=fsdp"} in sets or {"strategy=fsdp", "train.activation_checkpointing=full"} in sets
    assert not any(one < other for one in sets for other in sets)
    assert all(fix.memory.total < 80 * GIB for fix in misfit.fixes)


def test_workers_share_the_memory_of_a_host_but_not_of_a_gpu(chat_rows, cache, tmp_path):
    memory = planned(chat_rows, cache, tmp_path).memory
    host, gpu = (Device(name="", memory=GIB, shared=shared) for shared in (True, False))
    assert host.share(memory, 4) == 4 * gpu.share(memory, 4)


def test_every_strategy_has_an_estimate(chat_rows, cache, tmp_path):
    strategies = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    plans = [planned(chat_rows, cache, tmp_path, "resources=local", f"strategy={name}") for name in strategies]
    assert len(STATES) == 3
    assert all(plan.memory.total > 0 for plan in plans)


def test_the_command_shows_parts_and_verdicts(chat_rows, tmp_path, capsys, monkeypatch):
    on(monkeypatch, 40)
    run = load_config(
        "plan", ["model=tiny_random", "resources=inline", f"data.path={chat_rows}", f"data.cache={tmp_path}", *LLAMA3_8B, *EAGER]
    )
    assert command.main(run) == 0
    shown = capsys.readouterr().out
    assert "not prepared yet" in shown
    assert "activations    31.25 GiB" in shown
    assert "train.activation_checkpointing=full" in shown


def test_a_reference_takes_memory_where_it_is_another_model_or_a_copy(chat_rows, cache, tmp_path):
    def of(*overrides: str) -> tuple[int, Plan]:
        settings = ("data=chat_pairs", "stage=dpo", "stage.reference=online", "train.precision=fp32", *overrides)
        plan = planned(chat_rows, cache, tmp_path, *settings)
        return plan.memory.reference, plan

    assert of()[0] == 0
    size, plan = of("adapter=none")
    assert size == 2 * 4 * plan.parameters.trained
    size, plan = of("stage.reference_adapter=other")
    assert size == 4 * plan.parameters.frozen
    before, _ = of("stage.reference_adapter=other", "stage.reference=precomputed")
    assert 0 <= before < size


def test_a_misfit_for_its_copies_may_compute_the_reference_before(chat_rows, cache, tmp_path, monkeypatch):
    on(monkeypatch, 160)
    settings = ("data=chat_pairs", "stage=dpo", "stage.reference=online", "adapter=none", "data.max_length=2048")
    (verdict,) = planned(chat_rows, cache, tmp_path, *LLAMA3_8B, *settings).misfits
    assert ("stage.reference=precomputed",) in [fix.settings for fix in verdict.fixes]


def test_packs_of_pairs_hold_both_sides_and_train_both_answers(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "{n}", "chosen": "good good", "rejected": "bad"}}' for n in range(10, 30)))
    settings = ("data=prompt_completion_pairs", "stage=dpo", "data.max_length=128", "data.eval_fraction=0")
    run = tiny_run(str(rows), str(tmp_path / "cache"), tmp_path / "out", *settings)
    pipeline.prepare(run.model, run.data, run.resources, kind="pairs")
    data = api.plan(run).data
    assert data is not None and data.fill is not None and data.fill <= 1
    assert data.trained_tokens == 20 * (len("good good") + 1 + len("bad") + 1)


@pytest.mark.parametrize("overrides", [["train.epochs=2"], ["train.epochs=1"], ["data.eval_fraction=0"], ["train.max_steps=2"]])
def test_what_frozen_first_layers_gave_is_counted_on_a_cpu_as_a_sweep_keeps_it(chat_rows, cache, tmp_path, overrides):
    run = tiny_run(chat_rows, cache, tmp_path / "out", "adapter.last_layers=1", *overrides)
    unprepared = tiny_run(chat_rows, str(tmp_path / "cache"), tmp_path / "out", "adapter.last_layers=1", *overrides)
    assert api.plan(unprepared, in_sweep=True).memory.known >= 2**28  # all that there is room for
    workspace = Workspace(keeps_base=True)
    api.train(run, workspace=workspace)
    assert workspace.base is not None
    held = sum(states.nbytes for states in workspace.base.known._states.values())
    assert api.plan(run, in_sweep=True).memory.known == held > 0
    assert api.plan(tiny_run(chat_rows, cache, tmp_path / "out", *overrides)).memory.known == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=1"],
        ["adapter.last_layers=1", "train.epochs=2"],
        ["adapter.modules_to_save=[lm_head]", "train.max_steps=1"],
    ],
)
def test_the_operations_of_a_run_are_at_least_those_that_plan_counts(chat_rows, cache, tmp_path, overrides):
    settings = ("train.epochs=1", "data.eval_fraction=0", "model.config.hidden_size=256", "model.config.intermediate_size=512")
    run = tiny_run(chat_rows, cache, tmp_path / "out", *settings, *overrides)
    with FlopCounterMode(display=False, custom_mapping=OWN_PRODUCTS) as counter:
        api.train(run)
    found = api.plan(run).least_operations
    assert found is not None
    assert 0.7 * counter.get_total_flops() < found <= counter.get_total_flops()


def test_experts_that_a_token_does_not_visit_cost_no_operations(chat_rows, cache, tmp_path):
    of_two = (*MIXTURE, "+model.config.num_experts_per_tok=2")
    run = tiny_run(chat_rows, cache, tmp_path / "out", *of_two)
    pipeline.prepare(run.model, run.data, run.resources)
    few, many = (planned(chat_rows, cache, tmp_path, *of_two, f"++model.config.num_experts={count}") for count in (4, 32))
    assert few.least_operations is not None and many.least_operations is not None
    assert many.parameters.total > 3 * few.parameters.total
    assert few.least_operations < many.least_operations < 1.1 * few.least_operations  # the router has more rows


def test_a_plan_says_whose_reference_it_is_and_how_many_rows_a_step_has(chat_rows, cache, tmp_path, capsys):
    command.main(tiny_run(chat_rows, str(cache), tmp_path / "out", "data=chat_pairs", "stage=dpo"))
    said = " ".join(capsys.readouterr().out.split())
    assert "once for all rows before the first step" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantization=hqq", *TINY_MLP], "can't be hqq for every layer"),
        (["quantization=hqq", *MIXTURE], "quantization must be .* for mixtures of experts"),
    ],
)
def test_a_quantization_that_does_not_fit_the_model_is_refused_before_any_weight_is_loaded(
    chat_rows, cache, tmp_path, overrides, said
):
    run = tiny_run(chat_rows, cache, tmp_path / "out", *overrides)
    with pytest.raises(ConfigError, match=said):
        api.plan(run)
    with pytest.raises(ConfigError, match=said):
        preflight.check(run)


def test_layers_that_are_to_stay_wide_must_be_there(chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"quantization\.skip_modules must name linear layers"):
        planned(chat_rows, cache, tmp_path, "quantization=fp8", "quantization.skip_modules=[query]")


def test_an_adapter_outside_of_the_layers_is_trained_or_refused(chat_rows, cache, tmp_path):
    words = ["optimizer=badam", "adapter.targets=[embed_tokens,q_proj]"]
    with pytest.raises(ConfigError, match=r"optimizer\.outside_layers must be true to train .*embed_tokens"):
        preflight.check(tiny_run(chat_rows, cache, tmp_path / "out", *words))
    preflight.check(tiny_run(chat_rows, cache, tmp_path / "out", *words, "optimizer.outside_layers=true"))
