from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.hf import HFEngine
from raytune_llm.engines.requests import Completion
from raytune_llm.evaluate.exact_match import exact_match

PROMPT = "<|im_start|>user\nsay {}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Scripted:
    """An engine that gives prepared answers."""

    def __init__(self, *answers):
        self.answers, self.requests = answers, []

    def generate(self, requests):
        self.requests = requests
        return [Completion(ids=(), text=text, finish="stop", prompt_tokens=1) for text in self.answers]


def row(tokenizer, word, answer):
    prompt, reference = tokenizer.encode(PROMPT.format(word)), tokenizer.encode(answer + "<|im_end|>")
    ids = np.array([*prompt, *reference, *tokenizer.encode("\n")], dtype=np.int32)
    return ids, np.array([len(prompt), len(prompt) + len(reference)], dtype=np.int32)


def asked(rows):
    """Prompts and answers."""
    return [(ids[:start], ids[start:end]) for ids, (start, end) in rows]


def test_texts_are_compared_without_special_tokens_and_outer_white_space(tokenizer):
    rows = [row(tokenizer, "yes", "yes"), row(tokenizer, "no", "no"), row(tokenizer, "a b", "a b")]
    result = exact_match(Scripted(" yes\n", "No", "a  b"), tokenizer, asked(rows), max_new_tokens=4)
    assert (result.matches, result.total, result.fraction) == (1, 3, 1 / 3)
    assert [sample.correct for sample in result.samples] == [True, False, False]
    assert [sample.reference for sample in result.samples] == ["yes", "no", "a b"]
    assert [sample.answer for sample in result.samples] == ["yes", "No", "a  b"]
    assert "say yes" in result.samples[0].prompt


def test_the_model_is_asked_greedily_with_the_very_ids_of_training(tokenizer):
    engine = Scripted("x")
    exact_match(engine, tokenizer, asked([row(tokenizer, "x", "x")]), max_new_tokens=7, adapter="mine")
    [request] = engine.requests
    assert list(request.prompt_ids) == tokenizer.encode(PROMPT.format("x"))
    assert (request.sampling.temperature, request.sampling.max_new_tokens, request.adapter) == (0, 7, "mine")


def test_a_model_that_learnt_its_rows_by_heart_scores_full_marks(tokenizer):
    rows = [row(tokenizer, "one", "1, uno"), row(tokenizer, "two", "2, dos")]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None, **sizes))
    before = exact_match(HFEngine(model, tokenizer), tokenizer, asked(rows), max_new_tokens=8)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        for ids, (start, end) in rows:
            labels = torch.full((1, len(ids)), -100)
            labels[0, start:end] = torch.from_numpy(ids[start:end])
            model(torch.from_numpy(ids).long()[None], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    after = exact_match(HFEngine(model, tokenizer), tokenizer, asked(rows), max_new_tokens=8)
    assert (before.matches, after.matches) == (0, 2)
