"""engine=vllm and engine=sglang up to their packages' edge: what is asked of them, and what becomes of what they tell."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from raytune_llm import load_config
from raytune_llm.config.run import ServeRun
from raytune_llm.engines.engine import generate
from raytune_llm.engines.hosted import HostedEngine
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.requests import Grammar, Request, Sampling
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.serve.engines import ENGINES, build_engine, check_servable
from tests.toy_engine import END, Tokenizer, answer
from tests.unit.engines.hosted.packages import ToyPackage, toy_sglang, toy_vllm

PACKAGES = {"vllm": toy_vllm, "sglang": toy_sglang}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


def adapter(folder: Path, weights: int, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(json.dumps(weights))
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    return folder


def settings(engine: str, *overrides: str) -> ServeRun:
    return load_config("serve", ["model=smollm2_135m", f"engine={engine}", *overrides])


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def toy(package: str, monkeypatch: pytest.MonkeyPatch) -> ToyPackage:
    return PACKAGES[package](monkeypatch)


@pytest.fixture
def engine(package: str, toy: ToyPackage) -> Iterator[HostedEngine]:
    run = settings(package, "serve.max_adapters=4", "serve.max_rank=20", "serve.max_length=60")
    serving = Serving(
        model=run.model, quantization=run.quantization, config=LlamaConfig(), tokenizer=Tokenizer(), end_ids=[END],
        compute=torch.bfloat16, device=torch.device("cpu"), max_length=60, max_adapters=4, max_rank=20, max_host_adapters=16,
    )  # fmt: skip
    made: Any = ENGINES[package].build(run.engine, serving)
    yield made
    made.close()


def ask(engine: HostedEngine, prompt: list[int], adapter: str | None = None, **sampling: Any) -> Any:
    return engine.submit(Request(prompt_ids=prompt, adapter=adapter, sampling=Sampling(**sampling)))


def test_the_package_is_started_with_what_serve_says(engine: HostedEngine, toy: ToyPackage, package: str):
    told = toy.started_with
    if package == "vllm":
        assert (told.max_model_len, told.max_loras, told.max_lora_rank, told.max_cpu_loras) == (60, 4, 32, 16)
        assert (told.dtype, told.enable_lora, told.enforce_eager) == ("bfloat16", True, False)
    else:
        assert (told.context_length, told.max_loras_per_batch, told.max_lora_rank, told.max_loaded_loras) == (60, 5, 20, 16)
        assert (told.dtype, told.enable_lora, told.incremental_streaming_output) == ("bfloat16", True, True)


def test_requests_of_many_adapters_are_answered_side_by_side(engine: HostedEngine, tmp_path: Path):
    for number in (1, 2, 3):
        engine.add_adapter(f"a{number}", adapter(tmp_path / f"a{number}", number))
    asked = [([3, number], number, 12) for number in (0, 1, 2, 3, 0, 1)]
    requests = [
        Request(prompt_ids=prompt, adapter=f"a{weights}" if weights else None, sampling=Sampling(max_new_tokens=tokens))
        for prompt, weights, tokens in asked
    ]
    for told, (prompt, weights, tokens) in zip(generate(engine, requests), asked, strict=True):
        expected = answer(prompt, weights, tokens)
        assert list(told.ids) == expected and told.text == Tokenizer().decode(expected)
        assert (told.finish, told.prompt_tokens, told.cached_tokens) == ("length", 2, 3)
        assert (told.adapter_version is None) == (weights == 0)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.generated_tokens, stats.adapter_loads) == (0, 0, 72, 3)


def test_an_answer_ends_with_a_stop_string_an_end_token_or_the_model_s_length(engine: HostedEngine, toy: ToyPackage):
    words = [Tokenizer().decode([id]) for id in answer([5], 0, 30)]
    told = ask(engine, [5], max_new_tokens=30, stop=(words[4] + words[5],)).result()
    assert (told.finish, told.text) == ("stop", "".join(words[:4]))
    ended = ask(engine, [5], max_new_tokens=30, grammar=Grammar(kind="regex", text="7 8 9")).result()
    assert (ended.finish, ended.ids) == ("stop", (7, 8, 9))
    assert ask(engine, [5] * 50, max_new_tokens=30).result().finish == "length"
    assert len(ask(engine, [5] * 50, max_new_tokens=30).result().ids) == 10
    with pytest.raises(ConfigError, match="60 tokens"):
        ask(engine, [5] * 60)
    until = time.monotonic() + 10
    while len(toy.aborted) < 1:  # the one whose stop string came
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_a_request_says_reaches_the_package(engine: HostedEngine, toy: ToyPackage, package: str):
    said = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2}
    ask(engine, [5], max_new_tokens=4, min_new_tokens=2, seed=9, frequency_penalty=0.3, logit_bias=((7, 2.0),), **said).result()
    params = toy.asked[-1].sampling_params
    assert {name: getattr(params, name) for name in said} == said and params.frequency_penalty == 0.3
    if package == "vllm":
        assert (params.max_tokens, params.min_tokens, params.seed, params.top_k) == (4, 2, 9, 0)
        assert params.logit_bias == {7: 2.0} and params.stop_token_ids == [END]
    else:
        assert (params.max_new_tokens, params.min_new_tokens, params.sampling_seed, params.top_k) == (4, 2, 9, -1)
        assert params.logit_bias == {"7": 2.0} and params.stop_token_ids == [END]
    ask(engine, [5], max_new_tokens=4, ignore_end=True).result()
    assert not toy.asked[-1].sampling_params.stop_token_ids and toy.asked[-1].sampling_params.ignore_eos


@pytest.mark.parametrize("kind", ["json_schema", "json", "regex", "ebnf", "structural_tag"])
def test_every_kind_of_grammar_has_its_field(engine: HostedEngine, toy: ToyPackage, package: str, kind: Any):
    text = "" if kind == "json" else "7 8"
    ask(engine, [5], max_new_tokens=3, grammar=Grammar(kind=kind, text=text)).result()
    params = toy.asked[-1].sampling_params
    holds = params.structured_outputs if package == "vllm" else params
    fields = {"vllm": {"json_schema": "json", "json": "json_object", "ebnf": "grammar"}, "sglang": {"json": "json_schema"}}
    expected = {"vllm": {"json": True}, "sglang": {"json": '{"type": "object"}'}}[package].get(kind, text)
    assert getattr(holds, fields[package].get(kind, kind)) == expected


def test_log_probabilities_come_a_token_each(engine: HostedEngine):
    told = ask(engine, [5], max_new_tokens=3, logprobs=1).result()
    assert [one.token for one in told.logprobs] == list(told.ids)
    assert {one.logprob for one in told.logprobs} == {-0.5} and {one.top for one in told.logprobs} == {((1, -0.25),)}
    assert ask(engine, [5], max_new_tokens=3).result().logprobs == ()


def test_a_new_version_takes_the_next_requests_and_the_old_one_goes_when_its_own_are_done(
    engine: HostedEngine, toy: ToyPackage, tmp_path: Path
):
    folder = adapter(tmp_path / "a", 1)
    first = engine.add_adapter("a", folder)
    assert engine.add_adapter("a", folder) == first and len(toy.loaded) == 1
    running = ask(engine, [5], "a", max_new_tokens=40)
    next(iter(running))
    second = engine.add_adapter("a", adapter(tmp_path / "a", 2))
    assert second != first and not toy.gone
    assert list(ask(engine, [5], "a", max_new_tokens=5).result().ids) == answer([5], 2, 5)
    told = running.result()
    assert (list(told.ids), told.adapter_version) == (answer([5], 1, 40), first)
    engine.remove_adapter("a")
    assert not engine.has_adapter("a") and not engine.adapters()
    with pytest.raises(ConfigError, match="loaded"):
        ask(engine, [5], "a")
    assert len(toy.gone) == 2 and not toy.loaded


def test_pinning_is_told_to_the_package_and_undone(engine: HostedEngine, tmp_path: Path):
    version = engine.add_adapter("a", adapter(tmp_path / "a", 1))
    for pinned in (True, False):
        engine.pin("a", pinned)
        (state,) = engine.adapters()
        assert (state.pinned, state.version) == (pinned, version)
    assert list(ask(engine, [5], "a", max_new_tokens=5).result().ids) == answer([5], 1, 5)


def test_a_new_version_keeps_its_name_s_pin_and_one_slot_is_left_to_others(engine: HostedEngine, tmp_path: Path):
    for number in range(4):
        engine.add_adapter(f"a{number}", adapter(tmp_path / f"a{number}", number), pinned=number < 3)
    for refused in (
        lambda: engine.pin("a3", True),
        lambda: engine.add_adapter("a3", adapter(tmp_path / "a3", 9), pinned=True),
    ):
        with pytest.raises(ConfigError, match=r"slots for adapters, of which there are 4.*serve\.max_adapters"):
            refused()
    version = engine.add_adapter("a0", adapter(tmp_path / "a0", 8))
    (state,) = (one for one in engine.adapters() if one.name == "a0")
    assert (state.pinned, state.version) == (True, version)
    assert list(ask(engine, [5], "a0", max_new_tokens=5).result().ids) == answer([5], 8, 5)


def test_an_adapter_that_the_package_refuses_leaves_the_engine_alive(engine: HostedEngine, toy: ToyPackage, tmp_path: Path):
    with pytest.raises(ConfigError, match="shapes"):
        engine.add_adapter("bad", adapter(tmp_path / "bad", -1))
    with pytest.raises(ConfigError, match=r"serve\.max_rank=20"):
        engine.add_adapter("bad", adapter(tmp_path / "bad", 1, r=21))
    assert not engine.adapters() and not toy.loaded
    assert ask(engine, [5], max_new_tokens=2).result().finish == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("peft_type", "OFT"), ("task_type", "SEQ_CLS"),
     ("init_lora_weights", "pissa"), ("layer_replication", [[0, 1]]), ("target_parameters", ["experts"])],
)  # fmt: skip
def test_what_no_package_computes_is_refused_by_its_name(engine: HostedEngine, tmp_path: Path, field: str, value: Any):
    with pytest.raises(ConfigError, match=field):
        engine.add_adapter("a", adapter(tmp_path / "a", 1, **{field: value}))


@pytest.mark.parametrize(("field", "value"), [("rank_pattern", {"q": "x"}), ("rank_pattern", ["q"]), ("r", float("inf"))])
def test_a_config_whose_ranks_are_no_numbers_is_refused(engine: HostedEngine, tmp_path: Path, field: str, value: Any):
    with pytest.raises(ConfigError, match=r"must hold an adapter_config\.json of PEFT's"):
        engine.add_adapter("a", adapter(tmp_path / "a", 1, **{field: value}))


@pytest.mark.parametrize(("field", "value"), [("use_rslora", True), ("rank_pattern", {"q": 4}), ("alpha_pattern", {"q": 4})])
def test_what_sglang_would_read_past_is_refused_by_its_name(
    engine: HostedEngine, package: str, tmp_path: Path, field: str, value: Any
):
    folder = adapter(tmp_path / "a", 1, **{field: value})
    if package == "vllm":
        assert engine.add_adapter("a", folder)
    else:
        with pytest.raises(ConfigError, match=field):
            engine.add_adapter("a", folder)


def test_a_request_that_the_package_refuses_is_an_error_of_that_request(engine: HostedEngine):
    with pytest.raises(ConfigError, match="temperature is too high"):
        ask(engine, [5], temperature=2.0).result()
    with pytest.raises(ConfigError, match="engine=native"):
        engine.pooled([[5]], "mean")
    assert ask(engine, [5], max_new_tokens=2).result().finish == "length"


def test_a_request_that_nobody_waits_for_is_given_up(engine: HostedEngine, toy: ToyPackage, tmp_path: Path):
    engine.add_adapter("a", adapter(tmp_path / "a", 1))
    stream = ask(engine, [5], "a", max_new_tokens=50)
    next(iter(stream))
    stream.cancel()
    assert stream.result().finish == "cancelled"
    assert len(toy.aborted) == 1 and engine.adapters()[0].in_use == 0


def test_whoever_waits_is_told_when_the_engine_ends(engine: HostedEngine, toy: ToyPackage, package: str):
    stream = ask(engine, [5], max_new_tokens=50)
    next(iter(stream))
    if package == "vllm":  # SGLang ends the process
        toy.broken = "CUDA error"
        with pytest.raises(ResourceError, match="CUDA error"):
            stream.result()
        with pytest.raises(ResourceError, match="CUDA error"):
            ask(engine, [5])
    engine.close()
    with pytest.raises(ResourceError):
        stream.result()


def test_without_the_package_serve_says_what_to_install(package: str):
    run = settings(package)
    for checked in (
        lambda: check_servable(run.model, run.quantization, run.engine, run.serve),
        lambda: build_engine(run.model, run.quantization, run.engine, run.serve),
    ):
        with pytest.raises(ResourceError, match=rf"raytune-llm\[serve,{package}\]"):
            checked()


def test_what_a_package_can_not_load_is_refused_before_it_is_looked_for(package: str, toy: ToyPackage, tmp_path: Path):
    def refused(*overrides: str) -> str:
        run = settings(package, *overrides)
        with pytest.raises(ConfigError) as caught:
            check_servable(run.model, run.quantization, run.engine, run.serve)
        return str(caught.value)

    assert refused("quantization=bnb_nf4").startswith("quantization")
    assert refused("model=tiny_random").startswith("model.weights")
    folder = adapter(tmp_path / "a", 1, use_dora=True)
    assert "use_dora" in refused(f"serve.adapters={{mine: {folder}}}")
    if package == "vllm":
        assert refused("serve.max_rank=1024").startswith("serve.max_rank")


def test_another_python_is_for_engines_of_ray_serve(package: str):
    with pytest.raises(ConfigError, match=r"engine\.python"):
        settings(package, "engine.python=/opt/python")
    run = settings(package, "engine.python=/opt/python", "resources=local")
    check_servable(run.model, run.quantization, run.engine, run.serve)  # the package is looked for there


def test_a_seed_that_is_not_kept_is_named(package: str):
    assert settings(package).engine.keeps_seeds == (package == "vllm")
    if package == "sglang":
        assert settings(package, "engine.seeds=true").engine.keeps_seeds
