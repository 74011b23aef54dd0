"""Checks before anything is prepared or written: each part of a run raises an error for what it can't do.

The model is built on torch's meta device, with its layers and their shapes, but without memory for weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from raytune_llm import packaged
from raytune_llm.config.resources import uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.readers.declarations import check_held_out, declared
from raytune_llm.data.tokens.tokenizer import first_pieces
from raytune_llm.errors import ConfigError, ResourceError, UserError, first_line
from raytune_llm.models.adapters import adapt, merge
from raytune_llm.models.attention.cache import cache_lacks
from raytune_llm.models.build import run_config
from raytune_llm.models.generation_config import read_generation_config, savable
from raytune_llm.models.layers import layers
from raytune_llm.models.liger import check_liger
from raytune_llm.models.load import load_model
from raytune_llm.models.own_code import check_own_code
from raytune_llm.models.quantization import check_layers
from raytune_llm.models.stored import check_files
from raytune_llm.models.vocabulary import grow
from raytune_llm.report.trackers import check_tracker
from raytune_llm.runs.launch import check_devices
from raytune_llm.runs.workspace import Workspace
from raytune_llm.stages import STAGES
from raytune_llm.train.optimizers import build_optimizer
from raytune_llm.train.optimizers.groups import trained_in


def check(run: TrainRun, workspace: Workspace | None = None) -> None:
    """Raises UserError for a run that would fail. A run that was checked in this workspace is not checked again."""
    workspace = workspace or Workspace()
    if workspace.checked:
        return
    of_model = (run.model, run.data, run.stage, run.adapter, run.quantization, run.strategy, run.tracking, run.resources)
    # The learning rate makes no difference, so trials that differ only in it are checked once.
    of_optimizer = (run.optimizer.name, run.optimizer.groups, run.optimizer.trains_outside)
    workspace.once("checked", (*of_model, *of_optimizer), lambda: _check(run, workspace))


def _check(run: TrainRun, workspace: Workspace) -> None:
    check_tracker(run.tracking)
    packaged.check_models(run)
    check_devices(run)
    stage = STAGES[run.stage.name]
    kind = KINDS[run.stage.kind]
    declared(run.data, ranked=kind.ranked)
    check_held_out(run.data, ranked=kind.ranked)
    tokenizer, _ = workspace.tokenizer_of(run)
    config = run_config(run.model, tokenizer, run.data.max_length, packing=run.data.packing)
    with _sizes_fit():
        model = load_model(
            config,
            run.model.path,
            weights=run.model.weights,
            dtype=torch.float32,
            seed=run.train.seed,
            device="meta",
            trust_remote_code=run.model.trust_remote_code,
            scores=stage.scores is not None,
        )
    check_own_code(model)
    _check_answers(run, config)
    if run.model.path is not None and run.model.weights == "pretrained":
        check_files(model, run.model.path)
    pieces = first_pieces(run.model, tokenizer)
    grow(model, pieces)
    savable(read_generation_config(run.model.path))
    with torch.device("meta"):
        merge(model, run.model.merged_adapters)
        adapters = adapt(model, run.adapter, scores=stage.scores is not None, new_ids=sorted(pieces))
    check_layers(layers(model), run.quantization)
    if run.model.liger_kernel and not uses_ray(run.resources):
        check_liger(model, "cuda" if torch.cuda.is_available() else "cpu")
    _check_trained(run, adapters.model)
    build_optimizer(run.optimizer, adapters.model, fused=False, lr_factor=adapters.lr_factor)


def _check_trained(run: TrainRun, model: nn.Module) -> None:
    """Raises ConfigError if the optimizer would not train a parameter that the adapter's settings name."""
    if run.optimizer.trains_outside or run.adapter.trains_base:
        return
    if left := [one.name for one in trained_in(model) if one.layer is None]:
        rule = f"must be true to train {left[0]}, which is in no layer"
        raise ConfigError("optimizer.outside_layers", rule, got=False, fix="Set it to true, or optimizer=adamw.")


def _check_answers(run: TrainRun, config: PretrainedConfig) -> None:
    """Raises ConfigError if the run is to generate answers and the native engine does not support the model."""
    lacking = cache_lacks(config)
    for setting, rows in (("sample_rows", run.train.sample_rows), ("exact_match_rows", run.train.exact_match_rows)):
        if rows and lacking is not None:
            raise ConfigError(
                f"train.{setting}",
                f"must be 0 for {config.model_type}, {lacking}",
                got=rows,
                fix="Set it to 0; predict engine=hf answers rows after training.",
            )
    if not run.train.eval_tasks:
        return
    if lacking is not None:
        rule = f"must be empty for {config.model_type}, {lacking}"
        fix = "evaluate engine=hf asks tasks after training."
        raise ConfigError("train.eval_tasks", rule, got=run.train.eval_tasks, fix=fix)
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("train.eval_tasks needs lm_eval", "pip install 'raytune-llm[harness]'")
    for name in run.train.eval_tasks:
        if ("/" in name or name.endswith((".yaml", ".yml"))) and not Path(name).exists():
            raise ConfigError("train.eval_tasks", "must name files and folders that exist", got=name)


@contextmanager
def _sizes_fit() -> Iterator[None]:
    """Raises ConfigError if transformers can't build a model from the config: negative sizes, heads that don't divide a width."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError, AssertionError) as error:
        what = first_line(error)
        raise ConfigError("model.config", f"must make a model, which transformers can't build of it ({what})") from error
