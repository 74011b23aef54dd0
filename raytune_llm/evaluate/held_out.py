"""Exact match on held-out rows of a run's data, for the base or the trained model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import torch

from raytune_llm.config.adapter import NoAdapter, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.run import TrainRun
from raytune_llm.data.samples import split_sources
from raytune_llm.data.shared_stores import open_store
from raytune_llm.data.tokens.tokenizer import first_pieces, stop_ids
from raytune_llm.engines.batch import BatchEngine
from raytune_llm.evaluate.exact_match import ExactMatch, exact_match
from raytune_llm.models.build import build_policy, compute_dtype, run_config
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.runs.stores import held_out_part
from raytune_llm.runs.trained import Trained
from raytune_llm.runs.workspace import Workspace

NO_ADAPTER = NoAdapter(name="none")


def answer_held_out_rows(
    run: TrainRun,
    store_place: str,
    final: Path | None,
    whole_store: bool,
    workspace: Workspace | None = None,
    on_answered: Callable[[int, int], object] = lambda done, total: None,
) -> ExactMatch:
    """The exact match of the base, or with `final` of the trained model.

    whole_store: all rows of the store are held out, not a part of them. on_answered: called with the number of rows that are
    answered, and of all.
    """
    workspace = workspace or Workspace()
    model: ModelConfig = run.model
    adapter: NoAdapter | SavedAdapter = NO_ADAPTER
    if final is not None:
        trained = Trained(run, final)
        model = trained.model
        if trained.adapter is not None:
            adapter = SavedAdapter(path=str(trained.adapter), setting="final")
    store = open_store(store_place)
    _, by_source = split_sources(store, 1.0 if whole_store else held_out_part(run.data, store), run.train.seed)
    rows = islice(chain.from_iterable(rows.tolist() for rows in by_source.values()), run.train.exact_match_rows)
    tokenizer, template = workspace.tokenizer_of(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, _ = build_policy(
        run_config(model, tokenizer, run.data.max_length),
        model,
        adapter,
        compute=compute_dtype(run.train.precision, device),
        seed=run.train.seed,
        device=device,
        quantization=run.quantization,
        training=None,
        first_pieces=first_pieces(model, tokenizer),
        shared=None if run.quantization.replaces_layers else workspace.base,
    )
    assert isinstance(policy, CausalLM)
    return exact_match(
        BatchEngine(policy, tokenizer, stop_ids=stop_ids(tokenizer, template), device=device, on_answered=on_answered),
        tokenizer,
        [store.prompt_and_answer(row) for row in rows],
        max_new_tokens=run.train.max_new_tokens,
    )
