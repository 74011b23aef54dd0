"""docs/models.md: what conf/model has by name, and how each is trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import yaml
from transformers import AutoConfig

from raytune_llm.data.templates.named import guess
from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.isolation import check_isolation
from raytune_llm.models.load import check_trainable, model_class

CONF = Path(__file__).parents[2] / "conf" / "model"
UNNAMED = {"hub", "tiny_random"}
"""Options that are no checkpoint of the hub."""
ARCHITECTURES = {
    "apertus": "apertus", "arcee": "arcee", "aya": "cohere", "codegemma": "gemma", "cohere": "cohere", "cohere2": "cohere2",
    "deepseek_coder": "llama", "deepseek_llm": "llama", "deepseek_r1": "deepseek_v3", "deepseek_r1_distill_llama": "llama",
    "deepseek_r1_distill_qwen": "qwen2", "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "dots1": "dots1",
    "ernie4_5": "ernie4_5", "ernie4_5_moe": "ernie4_5_moe", "exaone4": "exaone4", "falcon3": "llama", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma3_vl": "gemma3", "glm4": "glm4", "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite", "glm_4": "glm", "glm_z1": "glm4", "gpt2": "gpt2", "granite3": "granite",
    "granitemoe": "granitemoe", "helium": "helium", "hunyuan": "hunyuan_v1_dense", "hunyuan_moe": "hunyuan_v1_moe",
    "llama2": "llama", "llama3": "llama", "llava": "llava", "minicpm3": "minicpm3", "minimax_m2": "minimax_m2",
    "ministral": "mistral", "mistral": "mistral", "mistral3": "mistral3", "mixtral": "mixtral", "moonlight": "deepseek_v3",
    "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo3", "olmoe": "olmoe", "openchat": "mistral", "opencoder": "llama",
    "opt": "opt", "phi1_5": "phi", "phi2": "phi", "phi3": "phi3", "phi4": "phi3", "pythia": "gpt_neox", "qwen1_5": "qwen2",
    "qwen1_5_moe": "qwen2_moe", "qwen2": "qwen2", "qwen2_5": "qwen2", "qwen2_5_vl": "qwen2_5_vl", "qwen2_vl": "qwen2_vl",
    "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "qwen3_vl": "qwen3_vl", "qwq": "qwen2", "seed_coder": "llama",
    "seed_oss": "seed_oss", "smollm": "llama", "smollm2": "llama", "smollm3": "smollm3", "solar": "llama",
    "starcoder2": "starcoder2", "tinyllama": "llama", "vicuna": "llama", "yi1_5": "llama", "zephyr": "mistral",
}  # fmt: skip
"""By the start of a name: the model_type in the checkpoint's config.json. The longest start counts."""
HEAD = """\
# Models

`model=NAME` takes a checkpoint of the hub by a short name; `model=hub model.path=...` takes any other, or a folder. What
decides whether a model can be trained is its architecture, the `model_type` of its `config.json`, not whether it is listed here.

The template is the one that `data.template=null` falls back on for a tokenizer without a chat template of its own, as base
models often have; where there is none, set `data.template`.

`python -m tests.pages` makes this page from `conf/model` and from the rules that a run is checked by.

| `model=` | hub id | architecture | template by name | trained |
|---|---|---|---|---|
"""


def checkpoints() -> dict[str, str]:
    """Name and hub id of each option that has one."""
    files = sorted(CONF.glob("[!_]*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text())["path"] for file in files if file.stem not in UNNAMED}


def architecture(name: str) -> str:
    """Raises ValueError for a name that starts like no family."""
    return ARCHITECTURES[max((start for start in ARCHITECTURES if f"{name}_".startswith(f"{start}_")), key=len)]


def page() -> str:
    return HEAD + "".join(f"{row}\n" for row in _rows())


def _rows() -> Iterator[str]:
    for name, path in checkpoints().items():
        model_type = architecture(name)
        template = guess(path)
        yield f"| `{name}` | {path} | `{model_type}` | {f'`{template}`' if template else ''} | {trained(model_type)} |"


@lru_cache
def trained(model_type: str) -> str:
    """In packs, or why not at all."""
    config = AutoConfig.for_model(model_type)
    try:
        check_trainable(config)
        known = model_class(config)
        assert known is not None
        check_isolation(config, known)
    except ConfigError as error:
        return f"no: {error.rule.rpartition(': ')[2].rpartition(', which ')[2] or error.rule}"
    return "in packs"
