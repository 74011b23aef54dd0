from __future__ import annotations

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raytune_llm.losses.routing import load_balance

E, K = 8, 2


def test_each_document_has_the_balance_that_it_has_alone():
    torch.manual_seed(0)
    lengths = [5, 1, 17]
    logits = torch.randn(sum(lengths), E)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    alone = [load_balancing_loss_func((part,), E, K) for part in logits.split(lengths)]
    torch.testing.assert_close(load_balance(logits, documents, 4, top_k=K)[:3], torch.stack(alone))


def test_experts_that_are_used_alike_give_top_k_and_a_single_one_the_most():
    alike = torch.eye(E).repeat(1, 1) * 50 + torch.eye(E).roll(1, 1) * 50
    torch.testing.assert_close(load_balance(alike, torch.zeros(E, dtype=torch.int64), 1, top_k=K), torch.tensor([float(K)]))
    one = torch.zeros(4, E)
    one[:, 0] = 50
    torch.testing.assert_close(load_balance(one, torch.zeros(4, dtype=torch.int64), 1, top_k=1), torch.tensor([float(E)]))
