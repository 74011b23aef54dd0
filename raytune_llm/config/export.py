from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, section
from raytune_llm.errors import ConfigError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

CALIBRATED = ("gptq", "awq")
"""Formats that are computed from calibration rows, by llmcompressor in an environment of its own."""
ALONE = ("adapter", "gguf_lora")
"""Formats of an adapter alone, for which nothing is merged."""
ON_NODES = ("hf", *CALIBRATED)
"""Formats that Ray tasks can write (resources=local or cluster)."""
GROUPED = ("w4a16", *CALIBRATED)
"""Formats with one scale for each group of inputs."""
LlamaCppType = Literal["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs"]
"""Types that need llama.cpp's program llama-quantize."""


@section
class ExportedAdapter:
    """The one adapter that is merged into `model`. Several adapters have names: export.adapters."""

    path: str | None
    """A folder that was written by training or by PEFT."""


@section
class ExportConfig:
    """A model in a form that other programs load: a base with adapters merged into it, or a model that a run trained in full."""

    run: str | None
    """The output folder of the run whose result is exported. null: `model` with `adapters`."""
    adapters: dict[str, str]
    """Name -> folder of adapters to merge (written by training or by PEFT), in addition to the adapter of `run`, which has the
    run's name. Their changes to the weights are added up."""
    weights: dict[str, float]
    """Name -> factor of an adapter's change: {a: 0.5} adds half of the change of a. Others have the factor 1."""
    format: Literal["hf", "adapter", "gguf", "gguf_lora", "ollama", "fp8", "w8a8", "w4a16", "nf4", "gptq", "awq"]
    """hf: a folder that transformers, vLLM and SGLang load. adapter: only the adapter, for PEFT, vLLM and SGLang. gguf: one file
    for llama.cpp. gguf_lora: only the adapter, for llama.cpp with a GGUF of the base. ollama: a GGUF file with a Modelfile. The
    others are like hf, with quantized linear layers. fp8, w8a8: weights and activations in 8 bits. w4a16, nf4: weights in 4
    bits, rounded to the nearest value. gptq, awq: weights in 4 bits, computed from calibration rows."""
    output_dir: str | None
    into_quantized: bool
    """Merge into the dequantized weights of a quantized base: of a base whose files are quantized, or of a run with
    `quantization=`. false: quantized files are refused, and the adapter of such a run is merged into the original weights."""
    dtype: Literal["auto", "fp32", "bf16", "fp16", "q8_0", LlamaCppType]
    """The data type of the weights. auto: the type that each tensor has in the base. q8_0, for gguf only: 8 bits, with a scale
    for every 32 numbers. Smaller types of llama.cpp need export.llama_quantize. In a quantized format, this is the type of the
    scales and of everything that is not quantized."""
    llama_quantize: str | None
    """The path of llama.cpp's program llama-quantize, for gguf and ollama with a dtype of fewer than 8 bits."""
    group_size: PositiveInt | None
    """For w4a16, gptq and awq: the number of inputs of a linear layer that share a scale. null: the largest of 128, 64 and 32
    that divides every layer's number of inputs."""
    calibration_rows: PositiveInt
    """For gptq and awq: the number of calibration rows, from `data.path` or else from the data that `run` trained on."""
    calibration_tokens: Annotated[int, Field(ge=2)]
    """For gptq and awq: the number of tokens of each calibration row, from its start."""
    python: str | None
    """For gptq and awq: the path of a Python whose environment has llmcompressor (on the nodes, if Ray is used). null: this
    Python, or with Ray an environment that Ray creates."""
    shard_size: str
    """Maximum size of a file, such as 5GB or 500MiB. A single larger tensor gets a file of its own."""
    check: Literal["auto"] | bool
    """Compare the export with the base and its adapter on held-out rows. auto: if memory suffices for the model in float32."""
    check_rows: NonNegativeInt
    max_kl: NonNegativeFloat | None
    """An export is refused if its outputs differ more from those of the base with its adapter: mean KL divergence in nats per
    token, or for a reward model the largest difference of a score. null: 0.01."""
    overwrite: bool
    """Replace an export that exists in output_dir."""
    push: str | None
    """Upload the checked export to this repository on the hub (owner/name), which is created if it is missing. The token is taken
    from HF_TOKEN or `hf auth login`; HF_ENDPOINT selects another hub."""
    push_private: bool
    """Create the repository as a private one."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ConfigError("export.output_dir", "must be given", fix="For example, export.output_dir=exported/mine.")
        if self.check is True and self.check_rows == 0:
            raise ConfigError("export.check_rows", "must be at least 1 if export.check=true", got=0)
        if self.into_quantized and self.format in ALONE:
            rule = f"must be false with export.format={self.format}, which merges nothing"
            raise ConfigError("export.into_quantized", rule, got=True, fix="Leave it out.")
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
