"""llama.cpp as the reader of a GGUF file, and small models of the families that it computes."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from raytune_llm.data.tokens.tokenizer import CHATML

TEXTS = ["A fox jumps over 12 lazy dogs.", "it's  two words, éàü\n\n and 3456 numbers", "<|im_start|>user\nHello<|im_end|>\n"]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's split, and ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


def small_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """A folder with a random model of the family, whose norms and biases are random too."""
    tokenizer = small_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | settings)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PLAIN = 40
"""A token of small_tokenizer that is one ASCII character."""


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def next_logprobs(self, ids: Sequence[int], number: int) -> dict[int, float]:
        """Of the likeliest tokens after the ids, in nats. The answer is always one token that is text by itself, since one that
        ends at once, or with half a character, has none. The bias is not in the log-probabilities."""
        asked = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": number,
            "temperature": 0,
            "logit_bias": [[PLAIN, 1000.0]],
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(asked)
        return {entry["id"]: entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}

    def tokenize(self, text: str) -> list[int]:
        return self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the file's own chat template writes it."""
        return self._post("apply-template", {"messages": messages})["prompt"]

    def _post(self, path: str, body: object) -> Any:
        address = f"{self._server.listening_address}/{path}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def llama_cpp(file: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.n_gpu_layers = 256, 1, False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    yield LlamaCpp(xllamacpp.Server(settings))


def next_logprobs(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """[V]: after the ids, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0, -1].log_softmax(-1).numpy()
