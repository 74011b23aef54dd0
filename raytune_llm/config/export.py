from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, section
from raytune_llm.errors import ConfigError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

CALIBRATED = ("gptq", "awq")
"""Formats that are computed from rows of data, in an environment of their own."""
ON_NODES = ("hf", *CALIBRATED)
"""Formats that Ray tasks may make."""
GROUPED = ("w4a16", *CALIBRATED)
"""Formats whose scales are of groups of inputs."""
LlamaCppType = Literal["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"]
"""Types that llama.cpp's own program makes of a GGUF file."""


@section
class ExportedAdapter:
    """Beside `model`: the one adapter that is merged into it. Several have names: `export.adapters`."""

    path: str | None
    """A folder that training wrote or PEFT saved."""


@section
class ExportConfig:
    """A model as other programs load it: a base with adapters merged into it, or what a run trained whole."""

    run: str | None
    """The output folder of a run: what it trained. null: `model`, with `adapters`."""
    adapters: dict[str, str]
    """Adapters of the base by name, folders that training wrote or PEFT saved; beside the one of `run`, which has the run's name.
    What each changes is added up."""
    weights: dict[str, float]
    """The factor of each adapter's change, by name: {a: 0.5} adds half of what a changes. Others have 1."""
    format: Literal["hf", "adapter", "gguf", "gguf_lora", "ollama", "fp8", "w8a8", "w4a16", "nf4", "gptq", "awq"]
    """hf: a folder that transformers, vLLM and SGLang load. adapter: the adapter alone, as PEFT, vLLM and SGLang load it. gguf:
    one file for llama.cpp. gguf_lora: the adapter alone, for llama.cpp with a GGUF of the base. ollama: a gguf with a Modelfile.
    Others are hf with quantized linear layers. fp8, w8a8: weights and activations in 8 bits. w4a16, nf4: weights in 4 bits,
    rounded to the nearest value. gptq, awq: weights in 4 bits that are chosen on calibration rows."""
    output_dir: str | None
    into_quantized: bool
    """Merge into what quantization left of the base's weights: into those that its files hold in few bits, unpacked, or into
    those that `run` trained over (its quantization=). false: such files are refused, and such a run's adapter is merged into the
    original weights."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "q8_0", LlamaCppType]
    """The type of the weights. auto: each tensor's own in the base. q8_0, in gguf alone: 8 bits, with a scale for 32
    numbers; those below it are llama.cpp's own, made by export.llama_quantize. In a quantized format: the type of what is not
    quantized, and of scales."""
    llama_quantize: str | None
    """llama.cpp's program llama-quantize, for gguf and ollama with a dtype of fewer than 8 bits."""
    group_size: PositiveInt | None
    """For w4a16, gptq and awq: inputs of a linear layer that share a scale. null: the largest of 128, 64 and 32 that divides
    each layer's."""
    calibration_rows: PositiveInt
    """For gptq and awq: rows of `data.path`, or else of what `run` trained on."""
    calibration_tokens: Annotated[int, Field(ge=2)]
    """The first tokens of each."""
    python: str | None
    """For gptq and awq: the Python of an environment with llmcompressor, on the nodes if Ray is used. null: this one, or with Ray
    one that Ray makes."""
    shard_size: str
    """Files of at most so much, as 5GB or 500MiB; one tensor may be larger."""
    check: Literal["auto"] | bool
    """Compare what was written with the base and its adapter on held-out rows. auto: where there is memory for the model in
    float32."""
    check_rows: NonNegativeInt
    max_kl: NonNegativeFloat | None
    """The largest mean divergence from the base with its adapter, in nats a token (of a reward model: the largest difference of
    a score), with which it is written at all. null: 0.01."""
    overwrite: bool
    """Take the place of an export that is there."""
    push: str | None
    """owner/name of a repository on the hub, which the export is uploaded to when it is whole and checked. It is made where there
    is none. HF_TOKEN or `hf auth login` give the token, HF_ENDPOINT another hub."""
    push_private: bool
    """Of a repository that is made: only its owner sees it."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ConfigError("export.output_dir", "must be given", fix="For example, export.output_dir=exported/mine.")
        if self.check is True and self.check_rows == 0:
            raise ConfigError("export.check_rows", "must be at least 1 if export.check=true", got=0)
        if self.python is not None and self.format not in CALIBRATED:
            rule = f"is for export.format={' or '.join(CALIBRATED)}"
            raise ConfigError("export.python", rule, got=self.python, fix="Set it to null.")
        if self.group_size is not None and self.format not in GROUPED:
            rule = f"is for export.format={' or '.join(GROUPED)}"
            raise ConfigError("export.group_size", rule, got=self.group_size, fix="Set it to null.")
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ConfigError("export.push", "must be owner/name, as a hub names a repository", got=self.push)
        needs = self.format in ("gguf", "ollama") and self.dtype in get_args(LlamaCppType)
        if needs and self.llama_quantize is None:
            rule = f"must name llama.cpp's program llama-quantize with export.dtype={self.dtype}"
            raise ConfigError("export.llama_quantize", rule, fix="Or set export.dtype=q8_0, which needs none.")
        if self.llama_quantize is not None and not needs:
            rule = f"is for export.format=gguf or ollama with export.dtype={', '.join(get_args(LlamaCppType))}"
            raise ConfigError("export.llama_quantize", rule, got=self.llama_quantize, fix="Set it to null.")
        assert self.shard_bytes

    @property
    def shard_bytes(self) -> int:
        found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", self.shard_size)
        if found is None or float(found[1]) == 0:
            rule = f"must be a number with a unit ({', '.join(UNITS)})"
            raise ConfigError("export.shard_size", rule, got=self.shard_size, fix="For example, 5GB.")
        return int(float(found[1]) * UNITS[found[2]])
