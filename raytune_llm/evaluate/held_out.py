"""How many held-out rows of a run's data a model answers word for word: the base, or what training made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch

from raytune_llm.config.run import TrainRun
from raytune_llm.data.loader import split_sources
from raytune_llm.data.store import Store
from raytune_llm.engines.hf import HFEngine
from raytune_llm.evaluate.exact_match import ExactMatch, exact_match
from raytune_llm.models.load import load_model
from raytune_llm.models.policy import compute_dtype, run_config
from raytune_llm.runs.tokenizer import tokenizer_of


def answer_held_out_rows(
    run: TrainRun, store_folder: str, held_out: float | Mapping[str, float], final: Path | None
) -> ExactMatch:
    """What the base model answers or, with `final`, what training made of it.

    `held_out`: the part of the store's rows that is, or of each source's.
    """
    trained_whole = final is not None and run.adapter.trains_base
    model = replace(run.model, path=str(final), weights="pretrained") if trained_whole else run.model
    adapter = None if trained_whole else final
    _, by_source = split_sources(store := Store.open(store_folder), held_out, run.train.seed)
    rows = islice(chain.from_iterable(rows.tolist() for rows in by_source.values()), run.train.exact_match_rows)
    tokenizer, _ = tokenizer_of(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_model(
        run_config(model, tokenizer, run.data.max_length),
        model.path,
        weights=model.weights,
        dtype=compute_dtype(run.train.precision, device) if device.type == "cuda" else torch.float32,
        seed=run.train.seed,
        device=device,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
    engine = HFEngine(base, tokenizer)
    if adapter is not None:
        engine.add_adapter("final", adapter)
    try:
        return exact_match(
            engine,
            tokenizer,
            [store.prompt_and_answer(row) for row in rows],
            max_new_tokens=run.train.max_new_tokens,
            adapter=None if adapter is None else "final",
        )
    finally:
        engine.close()
