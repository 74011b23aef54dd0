"""The engine's base in few bits: adapters are served on the layers that they were trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.load import load_config
from raytune_llm.config.serve import NativeEngine as NativeSettings
from raytune_llm.data.batches import collate, to_device
from raytune_llm.engines.native.build import Serving, native_engine
from raytune_llm.models.build import build_policy
from raytune_llm.models.quantization.nf4 import NF4Linear
from tests.invariant.test_served_equals_trained import Tokenizer

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
RANDOM = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", "++model.config={model_type: llama}"]


def test_an_adapter_is_served_on_a_base_in_four_bits(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(CONFIG), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path)
    run = load_config("serve", [*RANDOM, "quantization=bnb_nf4"])
    shared = {"compute": torch.float32, "device": CPU, "quantization": run.quantization}
    engine = native_engine(
        NativeSettings(
            name="native", max_rows=4, step_tokens=64, block_size=8, cache_gib=0.01, gpu_memory=0.9, prefix_cache=True,
            compile=False,
        ),
        Serving(
            model=run.model, config=CONFIG, tokenizer=Tokenizer(), end_ids=[], max_length=64, max_adapters=2, max_rank=8,
            max_host_adapters=4, **shared,
        ),
    )  # fmt: skip
    assert sum(isinstance(module, NF4Linear) for module in engine._runner._policy.modules()) == 14
    engine.add_adapter("a", tmp_path)
    prompt, answer = [5, 9, 40, 7], [3, 88, 2]
    scored = [one.logprob for one in engine.answer_logprobs([prompt], [answer], "a").result()[0]]
    likeliest = [one.top for one in engine.answer_logprobs([prompt], [answer], "a", top=2).result()[0]]
    of_base = [one.logprob for one in engine.answer_logprobs([prompt], [answer]).result()[0]]
    engine.close()
    trained, _ = build_policy(CONFIG, run.model, SavedAdapter(path=str(tmp_path), setting="adapter.path"), seed=0, **shared)
    ids = np.asarray([*prompt, *answer], np.int32)
    batch = to_device(collate([[(ids, ids[:0])]], length=len(ids), pad_id=0), CPU)
    with torch.no_grad():
        logprobs = trained.eval().logits(trained.hidden(batch)[0]).log_softmax(dim=1)
    expected = [float(logprobs[len(prompt) - 1 + number, token]) for number, token in enumerate(answer)]
    assert scored == pytest.approx(expected, abs=1e-4)
    for number, best in enumerate(likeliest):
        values, tokens = logprobs[len(prompt) - 1 + number].topk(2)
        assert [token for token, _ in best] == tokens.tolist()
        assert [value for _, value in best] == pytest.approx(values.tolist(), abs=1e-4)
    assert of_base != pytest.approx(expected, abs=1e-2)
