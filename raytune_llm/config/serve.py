from __future__ import annotations

import ipaddress
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

MIN_KEY = 8
"""Minimum characters of a key."""


@section
class ServedModels:
    """A base and its adapters, as an engine holds them."""

    adapters: dict[str, str]
    """Adapters by the names that requests use: folders that training wrote (`outputs/x/final`), or PEFT saved."""
    base_name: str | None
    """The model id of the base; null: its folder's or hub name."""
    max_adapters: PositiveInt
    """Adapters on the device at once, each in a slot. More may be loaded; they share the slots."""
    max_host_adapters: PositiveInt
    """Adapters that are held in host memory."""
    max_rank: PositiveInt
    """The highest rank that a slot holds."""
    precision: Literal["auto", "bf16", "fp32"]
    """auto: bf16 if the hardware supports it."""
    max_length: PositiveInt | None
    """Maximum tokens of a prompt and its answer; null: the model's positions, as far as the cache holds them."""
    template: str | None
    """A named chat template; null: the tokenizer's own."""


@section
class ServeConfig(ServedModels):
    watch: str | None
    """A folder of output folders: each run's `final/` is served under the run's name as soon as it is written, and its newest
    checkpoint as `<name>@<step>`."""
    adapter_roots: list[str]
    """Folders that adapters may be loaded from while it runs, beside `watch` and those of `adapters`."""
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    """0: a free one."""
    api_key: str | None
    """null: RAYTUNE_LLM_API_KEY; without either, no key is needed, which is allowed on a loopback address only."""
    admin_key: str | None
    """The key for changing adapters. null: RAYTUNE_LLM_ADMIN_KEY."""
    replicas: PositiveInt | tuple[PositiveInt, PositiveInt]
    """Engines on Ray Serve, each with the whole model: a number, or a minimum and a maximum for autoscaling."""
    max_waiting: PositiveInt
    """Requests that may wait for an engine; one more is answered with 429."""
    drain_s: PositiveInt
    """Seconds that running answers get when the server is stopped or updated."""
    write: str | None
    """Write Ray Serve's config of this server to the file, for a RayService or `serve deploy`, and serve nothing."""
    max_body_bytes: PositiveInt
    log_level: Literal["debug", "info", "warning", "error"]

    def __post_init__(self) -> None:
        for setting, key in (("serve.api_key", self.api_key), ("serve.admin_key", self.admin_key)):
            if key is not None and len(key) < MIN_KEY:
                raise ConfigError(setting, f"must have at least {MIN_KEY} characters", got="a shorter one")
        if "@" in "".join(self.adapters):
            fix = "Choose another name: `name@step` are checkpoints of serve.watch."
            raise ConfigError("serve.adapters", "must hold no name with an @", got=sorted(self.adapters), fix=fix)
        if self.fewest > self.most:
            raise ConfigError("serve.replicas", "must be a minimum and then a maximum", got=list(self.replicas))  # type: ignore[arg-type]

    @property
    def fewest(self) -> int:
        """Replicas, at least."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def most(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @property
    def on_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@section
class NativeEngine:
    """Ours: continuous batching, many adapters in one pass, on the layers that training computed with."""

    name: Literal["native"]
    max_rows: PositiveInt
    """Answers that are generated at once. A GPU has room for more: 128, say."""
    step_tokens: PositiveInt | None
    """Maximum tokens of a step: one of each answer, and chunks of new prompts. null: 8,192 on a GPU, 512 on a CPU."""
    block_size: PositiveInt
    """Tokens of a block of the KV cache."""
    cache_gib: PositiveFloat | None
    """Memory of the KV cache; null: `gpu_memory` of a GPU; on a CPU, room for max_rows answers of 2,048 tokens, at most 4 GiB."""
    gpu_memory: Fraction
    """Fraction of a GPU's memory for weights, adapters and cache together."""
    prefix_cache: bool
    """Shared prefixes of prompts are computed once."""
    compile: bool | Literal["auto"]
    """Layers are compiled and decoding steps captured as CUDA graphs. auto: on a GPU, which alone can."""

    said: ClassVar[str | None] = None
    """At the start, of what a user should know."""
    python: ClassVar[str | None] = None
    """Another Python than this process's, which the engine needs."""
    keeps_seeds: ClassVar[bool] = True
    """A request's seed gives the same answer again."""


@section
class HFEngine:
    """transformers' own forward and cache, one row and one adapter at a time: for models whose cache is more than keys and
    values, and adapters that can't be computed beside others."""

    name: Literal["hf"]
    max_rows: PositiveInt
    """Answers that are made side by side."""
    max_length: PositiveInt
    """Of models that have no positions, where serve.max_length says nothing."""

    said: ClassVar[str | None] = "engine=hf: rows are computed one at a time, with transformers' own forward"
    python: ClassVar[str | None] = None
    keeps_seeds: ClassVar[bool] = True


@section
class HostedEngine:
    """Another package's engine, in an environment that has the package."""

    max_rows: PositiveInt
    """Answers that are generated at once."""
    step_tokens: PositiveInt | None
    """Maximum tokens of a step; null: the package's own default."""
    gpu_memory: Fraction
    """Fraction of a GPU's memory for weights, adapters and cache together."""
    prefix_cache: bool
    """Shared prefixes of prompts are computed once."""
    python: str | None
    """The Python that has the package and raytune-llm, for the engines of Ray Serve; null: this one."""


@section
class VLLMEngine(HostedEngine):
    """vLLM's."""

    name: Literal["vllm"]
    compile: bool
    """Layers are compiled and decoding steps captured as CUDA graphs."""

    said: ClassVar[str | None] = "engine=vllm: vLLM computes; it gives no embeddings and no scores"
    keeps_seeds: ClassVar[bool] = True


@section
class SGLangEngine(HostedEngine):
    """SGLang's."""

    name: Literal["sglang"]
    seeds: bool
    """A request's seed gives the same answer whatever else is computed: SGLang's deterministic mode, which is slower. Without
    it, `seed` is ignored, and answers say so."""

    said: ClassVar[str | None] = "engine=sglang: SGLang computes; it gives no embeddings and no scores"

    @property
    def keeps_seeds(self) -> bool:
        return self.seeds


EngineConfig = Annotated[NativeEngine | HFEngine | VLLMEngine | SGLangEngine, Field(discriminator="name")]
