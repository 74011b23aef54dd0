from __future__ import annotations

import torch

from raytune_llm.config.load import load_config
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.runs import build

MODEL = "{model_type:llama,hidden_size:16,intermediate_size:32,num_hidden_layers:1,num_attention_heads:2,vocab_size:259}"


def test_workers_agree_on_memory_when_a_builder_is_made_and_not_when_it_is_read(monkeypatch):
    """Who reads it may be the one worker whose memory ran out: a collective call would wait for the others."""
    asked = []

    def least_usable_bytes(device: torch.device) -> float:
        asked.append(device)
        return 2.0**40

    monkeypatch.setattr(build, "least_usable_bytes", least_usable_bytes)
    model = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", f"++model.config={MODEL}"]
    run = load_config("train", [*model, "data.path=none", "resources=inline", "train.activation_checkpointing=auto"])
    builder = build.Builder(run, load_model_config(None, run.model.config), torch.device("cpu"))
    assert asked == [torch.device("cpu")]
    assert builder.fits
    assert builder.needs.checkpointing == "none"
    assert asked == [torch.device("cpu")]
