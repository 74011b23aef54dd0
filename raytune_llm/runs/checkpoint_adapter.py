"""Writes the adapter in a checkpoint as files that PEFT and a server load, also while the run is training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from raytune_llm.config.load import load_config as load_run
from raytune_llm.data.tokens.tokenizer import first_pieces
from raytune_llm.errors import DataError
from raytune_llm.models.adapters import OWN, PeftAdapters, merge
from raytune_llm.models.load import load_config, load_model
from raytune_llm.models.vocabulary import grow
from raytune_llm.runs.checkpoint_reader import CheckedReader
from raytune_llm.runs.tokenizer import tokenizer_of
from raytune_llm.train.checkpoint import one_process_is_meant
from raytune_llm.train.checkpoint_files import path_of

PARAMETERS = "parameters.model."
"""Prefix of the names of trained parameters in a checkpoint."""


def adapter_of_checkpoint(run_folder: Path, step: int, into: Path) -> bool:
    """Write the adapter of a checkpoint into a folder. Returns False if the run trains the whole model, or if its optimizer
    trains other weights than the average that it saves at the end.

    The model is built without weights, unless the adapter method changes them. Raises UserError if the checkpoint or the run's
    settings can't be read.
    """
    run = load_run("train", config_dir=run_folder, config_name="run")
    if run.adapter.trains_base or run.optimizer.schedules is not None:
        return False
    model = run.model
    place = path_of(run_folder / "checkpoints", step) / "state"
    try:
        entries = CheckedReader(place).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(PARAMETERS) and isinstance(entry, TensorStorageMetadata)
        }
        with one_process_is_meant():
            dcp.load(state, storage_reader=CheckedReader(place), no_dist=True)
    except (OSError, ValueError, dcp.api.CheckpointException) as error:
        raise DataError(str(place), f"can't be read ({error})") from None
    config = load_config(model.path, model.config, **model.config_options)
    device = torch.device("cpu" if run.adapter.changes_base else "meta")  # such an adapter is saved relative to the changed base
    base = load_model(
        config,
        model.path,
        weights=model.weights,
        dtype=torch.float32,
        seed=run.train.seed,
        device=device,
        trust_remote_code=model.trust_remote_code,
    )
    if run.adapter.changes_base:
        merge(base, model.merged_adapters)
    tokenizer, _ = tokenizer_of(run)
    pieces = first_pieces(model, tokenizer)
    grow(base, pieces)
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(run.train.seed)
        adapters = PeftAdapters(base)
        adapters.add_own(run.adapter, sorted(pieces))
    parameters = {name.removeprefix(PARAMETERS): value for name, value in state.items()}
    adapters.save(OWN, into, base_model=model.base_name, parameters=parameters)
    return True
