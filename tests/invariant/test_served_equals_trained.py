"""A served adapter gives the numbers that it was trained with: the engine against plain PEFT and the trainer's own forward."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm.data.batches import collate
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.graphs import DecodeGraphs
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.requests import Completion, Request, Sampling
from raytune_llm.errors import ConfigError
from raytune_llm.losses.tokens import token_logprobs
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.causal_lm import CausalLM

V = 101
CONFIG = LlamaConfig(
    vocab_size=V, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
RANKS = {"a": 4, "b": 8, "c": 2, "d": 16, "e": 8}


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x4E00 + id) for id in ids)


def base_model() -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # or greedy answers of a fresh model repeat one token
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def save_adapter(folder: Path, rank: int, seed: int) -> Path:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base_model(), config)
    torch.manual_seed(seed)  # after the base, which has its own
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for key in module.lora_A:
                torch.nn.init.kaiming_uniform_(module.lora_A[key].weight, a=5**0.5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(root / name, rank, seed) for seed, (name, rank) in enumerate(RANKS.items())}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]):
    """Greedy answers of plain PEFT with the single adapter, or of the bare base."""
    models: dict[str | None, Any] = {None: base_model()}
    for name, folder in folders.items():
        models[name] = PeftModel.from_pretrained(base_model(), str(folder)).eval()

    @torch.no_grad()
    def answer(adapter: str | None, prompt: list[int], tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(models[adapter](torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return answer


@pytest.fixture
def engine_of(folders: dict[str, Path]) -> Iterator[Any]:
    made: list[NativeEngine] = []

    def make(
        *, slots: int = 5, num_blocks: int = 200, step_tokens: int = 64, max_rows: int = 8, fixed_shapes: bool = False
    ) -> NativeEngine:
        model = base_model()
        attention.attach(model, "varlen")
        bank = LoraBank(model, num_slots=slots, max_rank=16, dtype=torch.float32)
        policy = CausalLM(model, adapters=bank)
        graphs = partial(DecodeGraphs, policy, bank=bank, max_rows=max_rows, max_length=400, compiled=False, captured=False)
        runner = PolicyRunner(
            policy,
            num_blocks=num_blocks,
            block_size=8,
            device=torch.device("cpu"),
            bank=bank,
            graphs=graphs if fixed_shapes else None,
        )
        engine = NativeEngine(runner, Tokenizer(), end_ids=[2], max_length=400, max_rows=max_rows, step_tokens=step_tokens)
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def asked(prompt: list[int], adapter: str | None, tokens: int, **more: Any) -> Request:
    return Request(prompt_ids=prompt, adapter=adapter, sampling=Sampling(max_new_tokens=tokens, ignore_end=True, **more))


def prompts(number: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, V, draw.integers(2, longest)).tolist() for _ in range(number)]


def without_end(ids: list[int]) -> bool:
    return 2 not in ids


def test_alone(engine_of, expected):
    engine = engine_of()
    for prompt, adapter in zip(prompts(6), [None, *RANKS], strict=True):
        wanted = expected(adapter, prompt, 12)
        if without_end(wanted):
            assert list(engine.submit(asked(prompt, adapter, 12)).result().ids) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 8},  # prompts in chunks, beside rows that decode
        {"num_blocks": 14, "max_rows": 6},  # rows are preempted and computed again
        {"slots": 2},  # adapters take turns
        {"fixed_shapes": True},  # as a CUDA graph holds them
    ],
    ids=["mixed", "chunks", "preempted", "evicted", "fixed shapes"],
)
def test_many_at_once_that_join_and_leave(engine_of, expected, settings: dict[str, int]):
    engine = engine_of(**settings)
    names = [None, *RANKS] * 4
    streams = []
    for number, (prompt, adapter) in enumerate(zip(prompts(24, seed=1), names, strict=True)):
        streams.append((prompt, adapter, 4 + number % 9, engine.submit(asked(prompt, adapter, 4 + number % 9))))
        time.sleep(0.002 * (number % 3))
    compared = 0
    for prompt, adapter, tokens, stream in streams:
        wanted = expected(adapter, prompt, tokens)
        if without_end(wanted):
            compared += 1
            assert list(stream.result().ids) == wanted, (adapter, len(prompt))
    assert compared > 12
    if "num_blocks" in settings:
        assert engine.stats().preemptions > 0
    if "slots" in settings:
        assert engine.stats().adapter_evictions > 0


def test_on_a_prefix_that_the_cache_holds_and_never_under_another_adapter(engine_of, expected):
    engine = engine_of()
    (prompt,) = prompts(1, seed=5, longest=61)
    prompt = (prompt * 3)[:50]
    for adapter in ("a", "b", None, "a", "b", None):
        completion: Completion = engine.submit(asked(prompt, adapter, 6)).result()
        assert list(completion.ids) == expected(adapter, prompt, 6)
    assert engine.stats().prefix_hits == 3 * 48


def test_after_a_reload_under_the_same_name(engine_of, folders, tmp_path: Path, expected):
    engine = engine_of()
    (prompt,) = prompts(1, seed=6)
    folder = tmp_path / "mine"
    shutil.copytree(folders["a"], folder)
    first = engine.add_adapter("mine", folder)
    assert list(engine.submit(asked(prompt, "mine", 6)).result().ids) == expected("a", prompt, 6)
    shutil.rmtree(folder)
    shutil.copytree(folders["d"], folder)
    assert engine.add_adapter("mine", folder) != first
    assert list(engine.submit(asked(prompt, "mine", 6)).result().ids) == expected("d", prompt, 6)


def test_log_probabilities_are_the_trainer_s(engine_of, folders):
    """The same rows, served and as the trainer computes them: packed, under their adapters."""
    engine = engine_of()
    for prompt, adapter in zip(prompts(6, seed=7), [None, *RANKS], strict=True):
        served = engine.submit(asked(prompt, adapter, 10, logprobs=0)).result()
        row = np.array([*prompt, *served.ids], np.int32)
        model: Any = base_model()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(folders[adapter]))
        attention.attach(model.get_base_model() if adapter else model, "varlen")
        policy = CausalLM(model).eval()
        other = np.arange(3, 30, dtype=np.int32)
        lines = [[(other, np.array([1, 2], np.int32)), (row, np.array([len(prompt), len(row)], np.int32))]]
        batch = collate(lines, length=len(row) + len(other), pad_id=0)
        with torch.no_grad():
            trained = policy(batch, token_logprobs)[1:]
        torch.testing.assert_close(torch.tensor([one.logprob for one in served.logprobs]), trained, rtol=0, atol=1e-4)


def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch(engine_of):
    engine = engine_of()
    (prompt,) = prompts(1, seed=8)
    mine = asked(prompt, "b", 15, temperature=1.0, seed=11)
    alone = engine.submit(mine).result()
    others = [engine.submit(asked(other, name, 20, temperature=0.7, seed=n))
              for n, (other, name) in enumerate(zip(prompts(6, seed=9), [None, *RANKS], strict=True))]  # fmt: skip
    beside = engine.submit(mine).result()
    assert alone.ids == beside.ids
    assert all(len(stream.result().ids) == 20 for stream in others)


def test_unloading_and_evicting_change_no_token_of_what_runs(engine_of, expected):
    engine = engine_of(slots=2)
    (prompt,) = prompts(1, seed=10, longest=20)
    stream = engine.submit(asked(prompt, "c", 60))
    next(iter(stream))
    engine.remove_adapter("c")
    busy = [engine.submit(asked([5, 6, 7], name, 3)) for name in ("a", "b", "d", "e") * 3]
    assert all(one.result().ids for one in busy)
    wanted = expected("c", prompt, 60)
    if without_end(wanted):
        assert list(stream.result().ids) == wanted


def test_a_bad_adapter_is_refused_and_the_engine_goes_on(engine_of, folders, tmp_path: Path, expected):
    engine = engine_of()
    bad = tmp_path / "bad"
    shutil.copytree(folders["a"], bad)
    weights = (bad / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError):
        engine.add_adapter("bad", bad)
    large = save_adapter(tmp_path / "large", 32, 9)
    with pytest.raises(ConfigError):
        engine.add_adapter("large", large)
    assert list(engine.submit(asked([9, 8, 7], "a", 4)).result().ids) == expected("a", [9, 8, 7], 4)


def test_many_threads_ask_at_once(engine_of):
    engine, failures = engine_of(), []

    def ask(seed: int) -> None:
        try:
            for prompt in prompts(4, seed=seed):
                engine.submit(asked(prompt, [None, *RANKS][seed % 6], 5)).result()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and engine.stats().cache_used == 0


def test_pooled_states_are_the_model_s(engine_of):
    engine = engine_of()
    texts = prompts(3, seed=12)
    model = base_model()
    for pooling in ("mean", "last"):
        vectors = engine.pooled(texts, pooling).result()
        for ids, vector in zip(texts, vectors, strict=True):
            with torch.no_grad():
                hidden_ND = model.model(torch.tensor([ids])).last_hidden_state[0]
            wanted = hidden_ND.mean(0) if pooling == "mean" else hidden_ND[-1]
            torch.testing.assert_close(torch.tensor(vector), wanted / wanted.norm(), rtol=1e-4, atol=1e-5)
    assert engine.pooled(texts, "mean", "a").result() != engine.pooled(texts, "mean").result()
