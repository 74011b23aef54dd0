"""Log-probabilities and entropies of the trained tokens in float64."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.tokens import segment_counts, segment_sums, token_entropy, token_logprobs
from tests.parity.llamafactory import IGNORE
from tests.parity.sets import oracle

ORACLE = oracle("logprobs")


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["id"])
def test_logprobs_of_tokens_and_sequences_are_the_formulas(case):
    inputs, expected = ORACLE["inputs"][case["input"]], case["expected"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64)[:, :-1]
    labels = torch.tensor(inputs["labels"])[:, 1:]
    trained = labels != IGNORE
    temperature = case["params"]["temperature"]

    logprobs = token_logprobs(logits[trained], labels[trained], temperature=temperature)
    entropy = token_entropy(logits[trained], temperature=temperature)
    row = trained.nonzero()[:, 0]
    sums, counts = segment_sums(logprobs, row, len(labels)), segment_counts(row, len(labels))

    def close(got, want):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    close(logprobs, torch.tensor(expected["token_logps"], dtype=torch.float64)[trained].tolist())
    close(entropy, torch.tensor(expected["token_entropy"], dtype=torch.float64)[trained].tolist())
    close(sums, expected["sum_logps"])
    close(sums / counts, expected["mean_logps"])
    assert counts.tolist() == expected["valid_length"]
