"""vLLM and SGLang as far as our server sees them: their recorded signatures over the toy model, each with its ways of telling.

A call that the package would not take fails here too, since arguments are bound to what was recorded of the package's sources.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.toy_engine import END, following
from tests.unit.engines.hosted.signatures import signature

STEP_S = 0.002


class Recorded:
    """Signatures of a package."""

    def __init__(self, package: str) -> None:
        told = json.loads((Path(__file__).parent / f"{package}.json").read_text())
        self.takes = {name: signature(parameters) for name, parameters in told["takes"].items()}

    def bind(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = self.takes[name].bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def kind(self, name: str) -> Any:
        """A class whose objects have the fields that it takes."""
        return lambda *args, **kwargs: SimpleNamespace(**self.bind(name, *args, **kwargs))


class ToyPackage:
    """What both have: adapters by number or name, and tokens of the toy model."""

    def __init__(self) -> None:
        self.loaded: dict[Any, int] = {}
        self.gone: list[Any] = []
        self.aborted: list[str] = []
        self.asked: list[Any] = []
        self.started_with: Any = None
        self.broken: str | None = None

    def read(self, key: Any, folder: str) -> None:
        weights = json.loads((Path(folder) / "adapter_model.safetensors").read_text())
        if weights < 0:
            raise ValueError("the adapter's shapes are none of this model's")
        self.loaded[key] = weights

    async def tokens(self, ids: list[int], weights: int, most: int, ends: set[int], text: str | None) -> AsyncIterator[int]:
        """At most so many; the last one may be an end. text: a grammar's answer, token by token."""
        ids = list(ids)
        for number in range(most):
            await asyncio.sleep(STEP_S)
            said = [] if text is None else [*map(int, text.split()), END]
            token = said[number] if said else following(ids, weights)
            ids.append(token)
            yield token
            if token in ends:
                return


def toy_vllm(monkeypatch: pytest.MonkeyPatch) -> ToyPackage:
    toy, recorded = ToyPackage(), Recorded("vllm")

    class Invalid(ValueError):
        pass

    class AsyncLLM:
        errored = property(lambda self: toy.broken is not None)
        dead_error = property(lambda self: RuntimeError(toy.broken))

        @classmethod
        def from_engine_args(cls, *args: Any, **kwargs: Any) -> AsyncLLM:
            asyncio.get_running_loop()  # it must be made where it is asked
            toy.started_with = recorded.bind("AsyncLLM.from_engine_args", *args, **kwargs)["engine_args"]
            return cls()

        async def add_lora(self, *args: Any, **kwargs: Any) -> bool:
            lora = recorded.bind("AsyncLLM.add_lora", *args, **kwargs)["lora_request"]
            toy.read(lora.lora_int_id, lora.lora_path)
            return True

        async def pin_lora(self, *args: Any, **kwargs: Any) -> bool:
            return recorded.bind("AsyncLLM.pin_lora", *args, **kwargs)["lora_id"] in toy.loaded

        async def remove_lora(self, *args: Any, **kwargs: Any) -> bool:
            number = recorded.bind("AsyncLLM.remove_lora", *args, **kwargs)["lora_id"]
            toy.gone.append(number)
            return toy.loaded.pop(number, None) is not None

        async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            asked = SimpleNamespace(**recorded.bind("AsyncLLM.generate", *args, **kwargs))
            toy.asked.append(asked)
            params, lora, ended = asked.sampling_params, asked.lora_request, False
            assert params.detokenize is False and params.output_kind == "DELTA"
            if params.temperature > 1.9:
                raise Invalid("temperature is too high")
            weights = 0 if lora is None else toy.loaded[lora.lora_int_id]
            grammar = params.structured_outputs and params.structured_outputs.regex
            made = 0
            try:
                async for token in toy.tokens(
                    asked.prompt.prompt_token_ids, weights, params.max_tokens, set(params.stop_token_ids), grammar
                ):
                    made += 1
                    stops = token in params.stop_token_ids
                    ended = stops or made == params.max_tokens
                    likely = {1: -0.25, 2: -1.0, token: -0.5}
                    told = {one: SimpleNamespace(logprob=value) for one, value in likely.items()}
                    output = SimpleNamespace(
                        token_ids=[token],
                        logprobs=None if params.logprobs is None else [told],
                        finish_reason="stop" if stops else "length" if ended else None,
                    )
                    yield SimpleNamespace(outputs=[output], num_cached_tokens=3)
            finally:
                if not ended:
                    toy.aborted.append(asked.request_id)

        def shutdown(self) -> None:
            recorded.bind("AsyncLLM.shutdown")

    kinds = {name: recorded.kind(name) for name in ("AsyncEngineArgs", "SamplingParams", "TokensPrompt")}
    output_kinds = SimpleNamespace(**{name: name for name in recorded.takes["RequestOutputKind"].parameters})
    structured = recorded.kind("StructuredOutputsParams")
    module(monkeypatch, "vllm", **kinds)
    module(monkeypatch, "vllm.v1.engine.async_llm", AsyncLLM=AsyncLLM)
    module(monkeypatch, "vllm.exceptions", VLLMValidationError=Invalid)
    module(monkeypatch, "vllm.lora.request", LoRARequest=recorded.kind("LoRARequest"))
    module(monkeypatch, "vllm.sampling_params", RequestOutputKind=output_kinds, StructuredOutputsParams=structured)
    return toy


def toy_sglang(monkeypatch: pytest.MonkeyPatch) -> ToyPackage:
    toy, recorded = ToyPackage(), Recorded("sglang")

    class TokenizerManager:
        def abort_request(self, *args: Any, **kwargs: Any) -> None:
            toy.aborted.append(recorded.bind("TokenizerManager.abort_request", *args, **kwargs)["rid"])

    class Engine:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asyncio.get_running_loop()
            toy.started_with = SimpleNamespace(**recorded.bind("Engine", *args, **kwargs))
            self.tokenizer_manager = TokenizerManager()

        async def async_load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
            asked = recorded.bind("Engine.async_load_lora_adapter", *args, **kwargs)
            try:
                toy.read(asked["lora_name"], asked["lora_path"])
            except ValueError as error:
                return SimpleNamespace(success=False, error_message=str(error))
            return SimpleNamespace(success=True, error_message=None)

        async def async_unload_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
            name = recorded.bind("Engine.async_unload_lora_adapter", *args, **kwargs)["lora_name"]
            toy.gone.append(name)
            return SimpleNamespace(success=toy.loaded.pop(name, None) is not None)

        async def async_generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
            asked = SimpleNamespace(**recorded.bind("Engine.async_generate", *args, **kwargs))
            asked.sampling_params = SimpleNamespace(**recorded.bind("SamplingParams", **asked.sampling_params))
            assert asked.stream
            toy.asked.append(asked)
            return self._told(asked)

        async def _told(self, asked: Any) -> AsyncIterator[dict[str, Any]]:
            params, made = asked.sampling_params, 0
            if params.temperature > 1.9:
                raise ValueError("temperature is too high")
            weights = 0 if asked.lora_path is None else toy.loaded[asked.lora_path]
            async for token in toy.tokens(
                asked.input_ids, weights, params.max_new_tokens, set(params.stop_token_ids), params.regex
            ):
                made += 1
                stops = token in params.stop_token_ids
                ended = {"type": "length"} if made == params.max_new_tokens else None
                reason = {"type": "stop", "matched": token} if stops else ended
                about: dict[str, Any] = {"finish_reason": reason, "cached_tokens": 3}
                if asked.return_logprob:
                    about["output_token_logprobs"] = [(-0.5, token, None)]
                    about["output_top_logprobs"] = [[(-0.25, 1, None), (-0.5, token, None)][: asked.top_logprobs_num]]
                yield {"output_ids": [token], "meta_info": about}

        def shutdown(self) -> None:
            recorded.bind("Engine.shutdown")

    module(monkeypatch, "sglang", Engine=Engine)
    return toy


def module(monkeypatch: pytest.MonkeyPatch, name: str, **holds: Any) -> None:
    """With the packages that it is in."""
    parts = name.split(".")
    for number in range(1, len(parts)):
        outer = ".".join(parts[:number])
        if outer not in sys.modules:
            module(monkeypatch, outer)
    made = ModuleType(name)
    made.__path__ = []
    made.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]  # find_spec asks for one
    made.__dict__.update(holds)
    monkeypatch.setitem(sys.modules, name, made)
