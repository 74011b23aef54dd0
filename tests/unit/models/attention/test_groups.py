"""S2 attention (LongLoRA, Chen et al. 2023, arXiv 2309.12307) against its formula, spelled out with masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raytune_llm import api, load_config
from raytune_llm.config.adapter import NoAdapter
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import cross_entropy
from raytune_llm.models import attention
from raytune_llm.models.attention.groups import group_bounds
from raytune_llm.models.build import ForTraining, build_policy, run_config
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.layers import layers
from raytune_llm.models.load import load_config as load_config_of_model
from tests.group import metrics
from tests.models import logits, model_section, packed, some_rows, tiny_llama
from tests.runs import tiny_run

LENGTHS = [3, 17, 5, 40, 2, 8]
GROUP = 8


def shifting(backend: str = "varlen", group: int = GROUP) -> CausalLM:
    model = CausalLM(tiny_llama(backend).model, attention_backend=backend, shift_attn_tokens=group)
    attention.attach(model.base, backend)
    return model.train()


def published(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, *, wraps: bool) -> torch.Tensor:
    """[B, H, T, D] each, of one row. As in the paper's algorithm: half of the heads move by half a group, groups become rows of
    a batch, what comes out moves back. Where it wraps, the last group ends with the row's first tokens; else these are a group
    of their own."""
    _, H, T, _ = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    position = torch.arange(T)
    moved = position.roll(-group // 2)
    out = torch.empty_like(query)
    for heads, order in ((slice(H // 2), position), (slice(H // 2, None), moved)):
        for rows in order.split(group):
            parts = [rows] if wraps else [rows[rows >= rows[0]], rows[rows < rows[0]]]
            for part in (part for part in parts if len(part)):
                of_part = (x[:, heads, part] for x in (query, key, value))
                out[:, heads, part] = torch.nn.functional.scaled_dot_product_attention(*of_part, is_causal=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
@pytest.mark.parametrize(("heads", "of_keys"), [(4, 4), (4, 2), (4, 1), (9, 3)])
def test_a_row_attends_as_the_paper_says(backend, heads, of_keys):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, 32, 8, dtype=torch.float64) for count in (heads, of_keys, of_keys))
    batch = packed(some_rows([32]))
    beside = attention.arguments(backend, batch, None, GROUP)
    found, _ = attention.BACKENDS[backend](torch.nn.Module(), query, key, value, None, **beside)
    torch.testing.assert_close(found, published(query, key, value, GROUP, wraps=False))
    wrapped = published(query, key, value, GROUP, wraps=True)
    torch.testing.assert_close(found[:, GROUP // 2 :], wrapped[:, GROUP // 2 :])
    assert not torch.allclose(found[:, : GROUP // 2], wrapped[:, : GROUP // 2])  # these would see the row's end


def test_groups_are_those_of_each_document_and_padded_with_empty_ones():
    bounds = torch.tensor([0, 3, 20, 24], dtype=torch.int32)
    for shifted, begin in ((False, [0, 3, 11, 19, 20]), (True, [0, 3, 7, 15, 20])):
        found = group_bounds(bounds, 24, GROUP, shifted=shifted).tolist()
        assert [place for place in found if place < 24] == begin
        assert found[len(begin) :] == [24] * (len(found) - len(begin)) and found[-1] == 24


@pytest.mark.parametrize("tokens", range(1, 40))
def test_there_is_room_for_all_groups(tokens):
    bounds = torch.arange(0, 4 * tokens + 1, tokens, dtype=torch.int32)
    for group in (2, 4, 8):
        for shifted in (False, True):
            assert group_bounds(bounds, 4 * tokens, group, shifted=shifted)[-1] == 4 * tokens


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_a_row_in_a_pack_learns_what_it_learns_alone(backend):
    rows = some_rows(LENGTHS)
    together, alone = shifting(backend), shifting(backend)
    together(packed(rows, length=96), cross_entropy).sum().backward()
    for row in rows:
        alone(packed([row]), cross_entropy).sum().backward()
    for (name, a), (_, b) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_compiled_layers_compute_the_same():
    batch = packed(some_rows(LENGTHS))
    plain, compiled = shifting(), shifting()
    for layer in layers(compiled.base):
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(plain(batch, logits), compiled(batch, logits), atol=1e-5, rtol=1e-4)


def test_only_training_attends_in_groups():
    batch, shifted, plain = packed(some_rows(LENGTHS)), shifting(), tiny_llama()
    assert not torch.allclose(shifted(batch, logits), plain(batch, logits), atol=1e-3)
    assert torch.equal(shifted.eval()(batch, logits), plain.eval()(batch, logits))


def test_short_rows_within_half_a_group_attend_to_all():
    batch = packed(some_rows([4, 3, 1]))
    torch.testing.assert_close(shifting()(batch, logits), tiny_llama().train()(batch, logits), atol=1e-6, rtol=1e-5)


def test_a_run_trains_in_groups_and_evaluates_without(chat_rows, tmp_path):
    first = {}
    for tokens in ("16", "null"):
        run = tiny_run(chat_rows, str(tmp_path / "cache"), tmp_path / tokens, f"model.shift_attn_tokens={tokens}")
        api.train(replace(run, train=replace(run.train, max_steps=1, eval_on_start=True)))
        first[tokens] = metrics(tmp_path / tokens)
    (before, step, *_), (before_of_all, step_of_all, *_) = first["16"], first["null"]
    assert before["eval_loss"] == before_of_all["eval_loss"]
    assert step["loss"] != step_of_all["loss"]


@pytest.mark.parametrize("trains", [True, False])
def test_a_run_says_that_it_trains_in_groups(trains):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300}
    model = model_section(path=None, weights="random", config={"model_type": "llama", **sizes}, shift_attn_tokens=16)
    cpu, config = torch.device("cpu"), load_config_of_model(None, model.config)
    settings = {"compute": torch.float32, "seed": 0, "device": cpu, "training": ForTraining() if trains else None}
    _, choice = build_policy(config, model, NoAdapter(name="none"), **settings)
    assert ("; in groups of 16 tokens" in choice) == trains


@pytest.mark.parametrize(
    ("of_model", "said"),
    [
        ({"model_type": "gemma3_text"}, "not all of its layers have full attention"),
        ({"model_type": "mistral", "sliding_window": 8}, "not all of its layers have full attention"),
        ({"model_type": "gpt_oss"}, "not all of its layers have full attention"),
        ({"model_type": "falcon"}, "not all of its layers have full attention"),
        ({"model_type": "llama", "vocab_size": 300}, "must be below data.max_length, which is 16"),
    ],
)
def test_models_that_it_does_not_suit_are_refused_by_name(of_model, said):
    model = model_section(path=None, weights="random", config=of_model, shift_attn_tokens=16)
    with pytest.raises(ConfigError, match=rf"model.shift_attn_tokens.*{said}"):
        run_config(model, byte_tokenizer(), max_length=16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stage=dpo"], "can't be combined with stage=dpo, whose reference attends to all"),
        (["stage=orpo", "data.share_prompts=true"], "can't be combined with data.share_prompts=true"),
        (["train.cuda_graphs=true"], "can't be combined with train.cuda_graphs=true"),
        (["model.shift_attn_tokens=3"], "must be"),
        (["model.shift_attn_tokens=0"], "must be"),
    ],
)
def test_what_it_can_not_be_combined_with_is_refused(settings, said):
    with pytest.raises(ConfigError, match=rf"model.shift_attn_tokens.*{said}"):
        load_config("train", ["model=tiny_random", "data.path=x", "model.shift_attn_tokens=16", *settings])
