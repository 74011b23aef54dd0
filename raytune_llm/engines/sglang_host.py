"""`engine=sglang`: SGLang's Engine computes, our server calls it. Written for SGLang 0.5.23; only this file names the package.

SGLang needs another torch and another transformers than training does, so it needs an environment of its own (docs/serving.md).
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from raytune_llm import packaged
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import ServedModels
from raytune_llm.config.serve import SGLangEngine as SGLangSettings
from raytune_llm.engines.adapter_limits import UNCOMPUTED, AdapterLimits
from raytune_llm.engines.host import AdapterVersion, GeneratedTokens, HostRequest
from raytune_llm.engines.hosted import HostedEngine, check_hosted
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.requests import TokenLogprob
from raytune_llm.errors import ConfigError, ResourceError

UNSUPPORTED = frozenset(UNCOMPUTED)
"""Fields of an adapter's config that SGLang ignores: it reads target_modules, r, lora_alpha and use_dora only."""
GRAMMARS = {"json_schema": "json_schema", "regex": "regex", "ebnf": "ebnf", "structural_tag": "structural_tag"}
"""Our kinds of grammar -> fields of SGLang's sampling parameters."""


def limits_of(max_rank: int) -> AdapterLimits:
    return AdapterLimits(package="SGLang", module="sglang", max_rank=max_rank, lacks=UNSUPPORTED)


def check_sglang(settings: SGLangSettings, model: ModelConfig, quantization: QuantizationConfig, served: ServedModels) -> None:
    check_hosted(settings, model, quantization, served, limits_of(served.max_rank))


def sglang_engine(settings: SGLangSettings, serving: Serving) -> HostedEngine:
    async def start() -> SGLangHost:
        # Log-probabilities are of the model's own logits, as with the other engines; SGLang reads this from the environment only.
        os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        from sglang import Engine

        try:
            return SGLangHost(Engine(**engine_arguments(settings, serving)))
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ResourceError("SGLang did not start", str(error)) from error

    return HostedEngine(start, serving, limits=limits_of(serving.max_rank), max_rows=settings.max_rows)


def engine_arguments(settings: SGLangSettings, serving: Serving) -> Mapping[str, Any]:
    """Keyword arguments of SGLang's ServerArgs."""
    assert serving.model.path is not None
    slots = serving.max_adapters + 1  # the base takes one
    return {
        "model_path": packaged.resolve(str(serving.model.path)),
        "revision": serving.model.revision,
        "trust_remote_code": serving.model.trust_remote_code,
        "dtype": str(serving.compute).removeprefix("torch."),
        "context_length": serving.limit,
        "max_running_requests": settings.max_rows,
        "chunked_prefill_size": settings.step_tokens,
        "mem_fraction_static": settings.gpu_memory,
        "disable_radix_cache": not settings.prefix_cache,
        "enable_lora": True,
        "max_loras_per_batch": slots,
        "max_loaded_loras": max(serving.max_host_adapters, slots),
        "max_lora_rank": serving.max_rank,
        "lora_target_modules": ["all"],
        "incremental_streaming_output": True,
        "enable_deterministic_inference": settings.seeds,
        "sampling_defaults": "openai",
        "random_seed": 0,
        "log_level": "error",
    }


class SGLangHost:
    """Implements Host."""

    def __init__(self, engine: Any) -> None:
        """engine: SGLang's Engine, created in the event loop that calls it."""
        self._engine = engine

    async def generate(self, request: HostRequest) -> AsyncGenerator[GeneratedTokens, None]:
        sampling, ended = request.sampling, False
        try:
            outputs = await self._engine.async_generate(
                input_ids=request.prompt_ids,
                sampling_params=sampling_arguments(request),
                return_logprob=sampling.logprobs is not None,
                top_logprobs_num=sampling.logprobs or 0,
                lora_path=None if request.version is None else request.version.key,
                stream=True,
                rid=request.key,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    meta = output["meta_info"]
                    reason = meta.get("finish_reason")
                    ended = reason is not None
                    yield GeneratedTokens(
                        ids=output["output_ids"],
                        logprobs=[] if sampling.logprobs is None else _logprobs(meta, sampling.logprobs),
                        cached_tokens=meta.get("cached_tokens", 0),
                        finish=None if reason is None else _finish(reason),
                    )
        except ValueError as error:
            raise ConfigError("the request", f"must be one that SGLang computes ({error})") from error
        finally:
            if not ended:
                self._engine.tokenizer_manager.abort_request(request.key)

    async def load(self, version: AdapterVersion) -> None:
        loaded = await self._engine.async_load_lora_adapter(version.key, version.files.name, version.pinned)
        if not loaded.success:
            raise ConfigError("the adapter", f"must be one that SGLang loads ({loaded.error_message})", got=version.name)

    async def unload(self, version: AdapterVersion) -> None:
        await self._engine.async_unload_lora_adapter(version.key)

    def failure(self) -> str | None:
        """None: if one of SGLang's processes ends, SGLang ends ours, too."""
        return None

    def close(self) -> None:
        self._engine.shutdown()


def sampling_arguments(request: HostRequest) -> Mapping[str, Any]:
    """Keyword arguments of SGLang's SamplingParams. Our server makes text from the tokens, and looks for stop strings."""
    sampling = request.sampling
    values: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "min_new_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): value for token, value in sampling.logit_bias} or None,
        "sampling_seed": sampling.seed % 2**31,
        "stop_token_ids": list(request.end_ids),
        "ignore_eos": sampling.ignore_end,
        "skip_special_tokens": False,
    }
    grammar = sampling.grammar
    if grammar is not None:
        values |= {"json_schema": '{"type": "object"}'} if grammar.kind == "json" else {GRAMMARS[grammar.kind]: grammar.text}
    return values


def _finish(reason: Mapping[str, Any]) -> Any:
    match reason["type"]:
        case "stop" | "length":
            return reason["type"]
        case _:
            raise ResourceError(f"SGLang ended an answer ({reason.get('message') or reason['type']})", "Ask again")


def _logprobs(meta: Mapping[str, Any], number: int) -> list[TokenLogprob]:
    """meta: SGLang's meta_info, with (log-probability, token id, text) per token, and lists of these for the likeliest tokens."""
    chosen = meta["output_token_logprobs"]
    likeliest = meta["output_top_logprobs"] if number else [[]] * len(chosen)
    return [
        TokenLogprob(token=token, logprob=value, top=tuple((other, logprob) for logprob, other, _ in top))
        for (value, token, _), top in zip(chosen, likeliest, strict=True)
    ]
