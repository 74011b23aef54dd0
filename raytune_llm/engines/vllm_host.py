"""`engine=vllm`: vLLM's AsyncLLM computes, our server calls it. Written for vLLM 0.33; the only file that names the package.

vLLM needs another torch and another transformers than training does, so it needs an environment of its own (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import torch

from raytune_llm import packaged
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import ServedModels
from raytune_llm.config.serve import VLLMEngine as VLLMSettings
from raytune_llm.engines.adapter_limits import AdapterLimits
from raytune_llm.engines.host import AdapterVersion, GeneratedTokens, HostRequest
from raytune_llm.engines.hosted import HostedEngine, check_hosted
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.requests import Grammar, TokenLogprob
from raytune_llm.errors import ConfigError, ResourceError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for."""
UNSUPPORTED = frozenset(
    {
        "peft_type", "task_type", "use_dora", "modules_to_save", "bias", "lora_bias", "init_lora_weights", "layer_replication",
        "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "use_qalora",
    }
)  # fmt: skip
"""Fields of adapter_config.json that vLLM does not support. It supports rsLoRA, and ranks and alphas per module."""
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def limits_of(max_rank: int) -> AdapterLimits:
    if max_rank > RANKS[-1]:
        raise ConfigError("serve.max_rank", f"must be at most {RANKS[-1]} with engine=vllm", got=max_rank)
    return AdapterLimits(package="vLLM", module="vllm", max_rank=max_rank, lacks=UNSUPPORTED)


def check_vllm(settings: VLLMSettings, model: ModelConfig, quantization: QuantizationConfig, served: ServedModels) -> None:
    check_hosted(settings, model, quantization, served, limits_of(served.max_rank))


def vllm_engine(settings: VLLMSettings, serving: Serving) -> HostedEngine:
    async def start() -> VLLMHost:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**engine_arguments(settings, serving))
        try:
            return VLLMHost(AsyncLLM.from_engine_args(arguments))
        except (ValueError, RuntimeError) as error:
            raise ResourceError("vLLM did not start", str(error)) from error

    return HostedEngine(start, serving, limits=limits_of(serving.max_rank), max_rows=settings.max_rows)


def engine_arguments(settings: VLLMSettings, serving: Serving) -> Mapping[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    assert serving.model.path is not None
    return {
        "model": packaged.resolve(str(serving.model.path)),
        "revision": serving.model.revision,
        "trust_remote_code": serving.model.trust_remote_code,
        "dtype": DTYPES[serving.compute],
        "max_model_len": serving.limit,
        "max_num_seqs": settings.max_rows,
        "max_num_batched_tokens": settings.step_tokens,
        "gpu_memory_utilization": settings.gpu_memory,
        "enable_prefix_caching": settings.prefix_cache,
        "enforce_eager": not settings.compile,
        "enable_lora": True,
        "max_loras": serving.max_adapters,
        "max_cpu_loras": max(serving.max_host_adapters, serving.max_adapters),
        "max_lora_rank": next(rank for rank in RANKS if rank >= serving.max_rank),
        "generation_config": "vllm",  # requests have all of it; the model's generation_config.json is not read
        "seed": 0,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }


class VLLMHost:
    """Implements Host."""

    def __init__(self, engine: Any) -> None:
        """engine: vLLM's AsyncLLM, created in the event loop that calls it."""
        self._engine = engine

    async def generate(self, request: HostRequest) -> AsyncGenerator[GeneratedTokens, None]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMValidationError

        try:
            outputs = self._engine.generate(
                TokensPrompt(prompt_token_ids=request.prompt_ids),
                SamplingParams(**sampling_arguments(request)),
                request.key,
                lora_request=None if request.version is None else _lora(request.version),
            )
            async with aclosing(outputs):  # closing aborts an unfinished request
                async for output in outputs:
                    (new,) = output.outputs
                    ids = list(new.token_ids)
                    yield GeneratedTokens(
                        ids=ids,
                        logprobs=_logprobs(ids, new.logprobs, request.sampling.logprobs),
                        cached_tokens=output.num_cached_tokens or 0,
                        finish=_finish(new.finish_reason),
                    )
        except (VLLMValidationError, ValueError) as error:
            raise ConfigError("the request", f"must be one that vLLM computes ({error})") from error

    async def load(self, version: AdapterVersion) -> None:
        try:
            await self._engine.add_lora(_lora(version))
            if version.pinned:
                await self._engine.pin_lora(version.number)
        except Exception as error:  # vLLM's process raises it as one of several classes
            raise ConfigError("the adapter", f"must be one that vLLM loads ({error})", got=version.name) from error

    async def unload(self, version: AdapterVersion) -> None:
        await self._engine.remove_lora(version.number)

    def failure(self) -> str | None:
        return str(self._engine.dead_error) if self._engine.errored else None

    def close(self) -> None:
        self._engine.shutdown()


def sampling_arguments(request: HostRequest) -> Mapping[str, Any]:
    """Keyword arguments of vLLM's SamplingParams. Our server makes text from the tokens, and looks for stop strings."""
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return {
        "max_tokens": request.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "seed": sampling.seed,
        "stop_token_ids": list(request.end_ids),
        "ignore_eos": sampling.ignore_end,
        "logprobs": sampling.logprobs,
        "structured_outputs": None if sampling.grammar is None else _structured(sampling.grammar),
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA,
    }


def _structured(grammar: Grammar) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match grammar.kind:
        case "json_schema":
            return StructuredOutputsParams(json=grammar.text)
        case "json":
            return StructuredOutputsParams(json_object=True)
        case "regex":
            return StructuredOutputsParams(regex=grammar.text)
        case "ebnf":
            return StructuredOutputsParams(grammar=grammar.text)
        case "structural_tag":
            return StructuredOutputsParams(structural_tag=grammar.text)


def _lora(version: AdapterVersion) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=version.key, lora_int_id=version.number, lora_path=version.files.name)


def _finish(reason: str | None) -> Any:
    match reason:
        case None:
            return None
        case "stop" | "length":
            return reason
        case _:
            raise ResourceError(f"vLLM ended an answer ({reason})", "Ask again")


def _logprobs(ids: list[int], by_position: Any, number: int | None) -> list[TokenLogprob]:
    """by_position: for each token, a dict of token id -> vLLM's Logprob, of the most likely tokens and the sampled one."""
    if number is None or by_position is None:
        return []
    found = []
    for id, by_token in zip(ids, by_position, strict=True):
        ranked = sorted(by_token.items(), key=lambda item: -item[1].logprob)[:number]
        top = tuple((token, one.logprob) for token, one in ranked)
        found.append(TokenLogprob(token=id, logprob=by_token[id].logprob, top=top))
    return found
