from __future__ import annotations

import pytest
import torch

from raytune_llm.engines.native import sampler
from raytune_llm.engines.native.sampler import RowSampler, allowed, logprobs, sample, uniform
from raytune_llm.engines.requests import Sampling

V = 50


def row(prompt: list[int] | None = None, end: tuple[int, ...] = (), **settings) -> RowSampler:
    return RowSampler(Sampling(**settings), end, prompt or [])


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def drawn(logits_V: torch.Tensor, draws: int, *, temperature: float = 1.0, **settings) -> torch.Tensor:
    """How often each token was drawn."""
    one = row(temperature=temperature, **settings)
    counts = torch.zeros(V)
    for _ in range(draws):
        counts[int(sample(logits_V[None].clone(), [one])[0])] += 1
        one.drawn += 1
    return counts / draws


def test_without_temperature_the_likeliest_token_is_taken():
    values = logits(3)
    assert torch.equal(sample(values.clone(), [row()] * 3), values.argmax(1))


def test_a_temperature_near_zero_takes_the_likeliest_token():
    values = 50 * logits(3)
    assert torch.equal(sample(values.clone(), [row(temperature=t) for t in (1e-300, 1e-40, 1e-6)]), values.argmax(1))


def test_a_top_k_beyond_the_vocabulary_and_any_number_leaves_all_tokens():
    values = logits(1)
    assert sample(values.clone(), [row(temperature=1.0, top_k=10**400)]) == sample(values.clone(), [row(temperature=1.0)])


def test_no_more_likely_tokens_are_told_than_there_are():
    (told,) = logprobs(logits(1), torch.tensor([0]), V + 10)
    assert len(told.top) == V


def test_draws_follow_the_probabilities():
    values = logits(1)[0]
    expected = torch.softmax(values / 0.7, 0)
    assert torch.allclose(drawn(values, 6000, temperature=0.7), expected, atol=0.02)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}, {"top_k": 5, "top_p": 0.6, "min_p": 0.1}])
def test_only_candidates_are_drawn(settings):
    values = logits(1)[0]
    probs, order = torch.softmax(values, 0).sort(descending=True)
    kept = torch.ones(V, dtype=torch.bool)
    if "top_k" in settings:
        kept[settings["top_k"] :] = False
    renormalized = probs * kept / (probs * kept).sum()
    kept &= renormalized.cumsum(0) - renormalized < settings.get("top_p", 1.0)
    kept &= probs >= settings.get("min_p", 0.0) * probs[0]
    counts = drawn(values, 2000, **settings)
    assert set(counts.nonzero().flatten().tolist()) == set(order[kept].tolist())


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_a_draw_among_the_likeliest_tokens_is_the_one_among_all(spread: float, monkeypatch: pytest.MonkeyPatch):
    """spread: with 0.1, most draws are of tokens behind the likeliest ones; with 6, nearly none."""
    limits = [{}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.3}, {"top_p": 0.999}, {"min_p": 0.05}, {"min_p": 1e-6}]
    limits += [{"top_k": 400, "top_p": 0.9, "min_p": 1e-4}, {"temperature": 0.0}, {"logit_bias": ((3, 50.0),)}]
    for number in range(20):
        rows = [row(**{"temperature": 1.0, "seed": number, **limit}) for limit in limits]
        values = spread * torch.randn(len(rows), 3000, generator=torch.Generator().manual_seed(number))
        found = sample(values.clone(), rows)
        with monkeypatch.context() as patched:
            patched.setattr(sampler, "LIKELIEST", 3000)
            assert torch.equal(found, sample(values.clone(), rows))


def test_a_row_draws_the_same_whatever_is_beside_it():
    values = logits(4)
    mine = row(temperature=1.0, seed=7)
    alone = sample(values[2:3].clone(), [mine])
    beside = sample(values.clone(), [row(temperature=2.0, seed=1, top_k=2), row(), mine, row(temperature=0.1, top_p=0.3)])
    assert alone[0] == beside[2]


def test_draws_of_a_seed_differ_by_number_and_seeds_differ():
    numbers = [uniform(seed, number) for seed in (0, 1, 2**63) for number in range(100)]
    assert len(set(numbers)) == 300 and all(0 <= number < 1 for number in numbers)


def test_penalties_are_as_written():
    values = logits(1)
    sampler = row([3, 4], repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler.change(values.clone()[0])
    sampler.count(5)
    sampler.count(5)
    changed = values.clone()
    sampler.change(changed[0])
    for token in range(V):
        expected = float(values[0, token])
        if token in (3, 4, 5):
            expected = expected / 2 if expected > 0 else expected * 2
        if token == 5:
            expected -= 0.5 + 2 * 0.25
        assert float(changed[0, token]) == pytest.approx(expected, abs=1e-6)


def test_a_bias_can_force_and_forbid_a_token():
    values = logits(2)
    best = int(values[0].argmax())
    tokens = sample(values.clone(), [row(logit_bias=((best, -100.0),)), row(logit_bias=((7, 100.0),))])
    assert tokens[0] != best and tokens[1] == 7


def test_the_end_is_no_candidate_before_min_new_tokens():
    values = logits(1)
    end = int(values[0].argmax())
    sampler = row(end=(end,), min_new_tokens=1)
    assert sample(values.clone(), [sampler])[0] != end
    sampler.drawn += 1
    assert sample(values.clone(), [sampler])[0] == end


@pytest.mark.parametrize("settings", [{"min_new_tokens": 9}, {"ignore_end": True}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_early_where_its_grammar_allows_nothing_else(settings, temperature: float):
    ends, other = (7, 8), 5
    mask = torch.zeros(3, 2, dtype=torch.int32)
    mask[0, 0] = 1 << 7
    mask[1, 0] = 1 << 7 | 1 << other
    mask[2] = -1
    rows = [row(end=ends, temperature=temperature, **settings) for _ in range(3)]
    first, second, third = sample(logits(3), rows, mask).tolist()
    assert (first, second) == (7, other) and third not in ends


def test_a_bitmask_forbids():
    values = logits(1)
    mask = torch.zeros(1, 2, dtype=torch.int32)
    mask[0, 0] = 1 << 5
    mask[0, 1] = -(2**31)  # bit 31 of the second word, token 63, which is none
    assert allowed(mask, V).nonzero().tolist() == [[0, 5]]
    assert sample(values, [row()], mask)[0] == 5


def test_logprobs_are_the_model_s_own():
    values = logits(2)
    told = logprobs(values, torch.tensor([4, 9]), 3)
    expected = torch.log_softmax(values, 1)
    assert told[1].token == 9 and told[1].logprob == pytest.approx(float(expected[1, 9]))
    assert [token for token, _ in told[0].top] == expected[0].topk(3).indices.tolist()
