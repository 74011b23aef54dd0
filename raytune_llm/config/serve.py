from __future__ import annotations

import ipaddress
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

MIN_KEY = 8
"""Minimum length of an API key in characters."""


ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
"""Characters that are safe in a path, a header and a log line."""
NAME_RULE = "start with a letter or a digit and have at most 128 letters, digits, dots, hyphens, underscores and @"


def is_adapter_name(name: str) -> bool:
    return ADAPTER_NAME.fullmatch(name) is not None and ".." not in name


@section
class ServedModels:
    """The base model and adapters of an engine."""

    setting: ClassVar[str] = "serve.adapters"
    """The setting that named the adapters."""

    adapters: dict[str, str]
    """Name in requests -> folder of the adapter, written by training (`outputs/x/final`) or by PEFT."""
    base_name: str | None
    """The model id of the base model; null: the name of its folder or hub repository."""
    max_adapters: PositiveInt
    """Number of slots for adapters on the device. More adapters can be loaded; they are swapped into the slots."""
    max_host_adapters: PositiveInt
    """Maximum number of adapters kept in host memory."""
    max_rank: PositiveInt
    """Maximum rank of an adapter."""
    precision: Literal["auto", "bf16", "fp32"]
    """auto: bf16 if the hardware supports it."""
    max_length: PositiveInt | None
    """Maximum tokens of a prompt and its answer; null: the model's maximum, or the size of the KV cache if that is less."""
    template: str | None
    """A named chat template; null: the tokenizer's own."""


@section
class ServeConfig(ServedModels):
    watch: str | None
    """A folder of output folders to watch: each run's `final/` is served under the run's name as soon as it is written, and its
    newest checkpoint as `<name>@<step>`."""
    adapter_roots: list[str]
    """Folders that adapters may be loaded from through the API, in addition to `watch` and the folders in `adapters`."""
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    """0: any free port."""
    api_key: str | None
    """null: the environment's RAYTUNE_LLM_API_KEY. Without either no key is required, which needs a loopback `host`."""
    admin_key: str | None
    """The key for changing adapters. null: the environment's RAYTUNE_LLM_ADMIN_KEY."""
    replicas: PositiveInt | tuple[PositiveInt, PositiveInt]
    """Engine replicas on Ray Serve, each with the full model: a number, or a minimum and a maximum for autoscaling."""
    max_waiting: PositiveInt
    """Maximum number of requests per engine beside the engine.max_rows that it computes; further ones are answered with status
    429."""
    drain_s: PositiveInt
    """How many seconds running answers get to finish when the server is stopped or updated."""
    write: str | None
    """Write the Ray Serve config of this server to this file, for a RayService or `serve deploy`, and exit."""
    max_body_bytes: PositiveInt
    log_level: Literal["debug", "info", "warning", "error"]

    def __post_init__(self) -> None:
        for setting, key in (("serve.api_key", self.api_key), ("serve.admin_key", self.admin_key)):
            if key is not None and len(key) < MIN_KEY:
                raise ConfigError(setting, f"must have at least {MIN_KEY} characters", got="a shorter one")
        if "@" in "".join(self.adapters):
            fix = "Choose another name: `name@step` is the name of a checkpoint in serve.watch."
            raise ConfigError("serve.adapters", "must hold no name with an @", got=sorted(self.adapters), fix=fix)
        for name in self.adapters:
            if not is_adapter_name(name):
                raise ConfigError("serve.adapters", f"must hold names that {NAME_RULE}", got=name[:200])
        if self.min_replicas > self.max_replicas:
            raise ConfigError("serve.replicas", "must be a minimum and then a maximum", got=list(self.replicas))  # type: ignore[arg-type]

    @property
    def min_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def max_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    @property
    def on_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@section
class NativeEngine:
    """Our engine: continuous batching, several adapters in one forward pass, and the layers that training uses."""

    name: Literal["native"]
    max_rows: PositiveInt
    """Maximum number of answers generated concurrently. A GPU has room for more, for example 128."""
    step_tokens: PositiveInt | None
    """Maximum tokens of a step: one of each running answer, plus chunks of new prompts. null: 8,192 on a GPU, 512 on a CPU."""
    block_size: PositiveInt
    """Tokens per block of the KV cache."""
    cache_gib: PositiveFloat | None
    """GiB of the KV cache; null: on a GPU, what `gpu_memory` leaves; on a CPU, max_rows answers of 2,048 tokens, up to 4."""
    gpu_memory: Fraction
    """Fraction of a GPU's memory for weights, adapters and cache together."""
    prefix_cache: bool
    """Shared prefixes of prompts are computed once."""
    compile: bool | Literal["auto"]
    """Compile layers and capture decoding steps as CUDA graphs, which needs a GPU. auto: if there is a GPU."""

    notice: ClassVar[str | None] = None
    """A line that is printed when the server starts."""
    python: ClassVar[str | None] = None
    """The Python that the engine needs, if it is not this process's."""
    keeps_seeds: ClassVar[bool] = True
    """A request with the same seed gets the same answer again."""


@section
class HFEngine:
    """transformers' own forward pass and cache, one request at a time. It is for models whose cache holds more than keys and
    values, and for adapters that can't share a batch with others."""

    name: Literal["hf"]
    max_rows: PositiveInt
    """Maximum number of answers generated concurrently."""
    max_length: PositiveInt
    """Maximum tokens of a prompt and its answer for models without a maximum of their own, if serve.max_length is null."""

    notice: ClassVar[str | None] = "engine=hf: requests are computed one at a time, with transformers' own forward pass"
    python: ClassVar[str | None] = None
    keeps_seeds: ClassVar[bool] = True


@section
class HostedEngine:
    """The engine of another package, which runs in an environment that has the package."""

    max_rows: PositiveInt
    """Maximum number of answers generated concurrently."""
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
    """vLLM's engine."""

    name: Literal["vllm"]
    compile: bool
    """Compile layers and capture decoding steps as CUDA graphs."""

    notice: ClassVar[str | None] = "engine=vllm: vLLM computes; it gives no embeddings and no scores"
    keeps_seeds: ClassVar[bool] = True


@section
class SGLangEngine(HostedEngine):
    """SGLang's engine."""

    name: Literal["sglang"]
    seeds: bool
    """Use SGLang's deterministic mode, which is slower: a request with the same seed gets the same answer, whatever else is in
    the batch. If it is off, `seed` is ignored, and answers say so."""

    notice: ClassVar[str | None] = "engine=sglang: SGLang computes; it gives no embeddings and no scores"

    @property
    def keeps_seeds(self) -> bool:
        return self.seeds


EngineConfig = Annotated[NativeEngine | HFEngine | VLLMEngine | SGLangEngine, Field(discriminator="name")]
