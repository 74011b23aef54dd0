"""docs/models.md: what conf/model has by name, and how each is trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import yaml
from transformers import AutoConfig

from raytune_llm.data.templates.named import guess
from raytune_llm.errors import ConfigError
from raytune_llm.models.attention.isolation import check_isolation, needs_lines
from raytune_llm.models.load import check_trainable, model_class

CONF = Path(__file__).parents[2] / "conf" / "model"
UNNAMED = {"hub", "tiny_random"}
"""Options that are no checkpoint of the hub."""
ARCHITECTURES = {
    "apertus": "apertus", "arcee": "arcee", "aya": "cohere", "bloom": "bloom", "codegemma": "gemma", "cohere": "cohere",
    "cohere2": "cohere2", "deepseek_coder": "llama", "deepseek_llm": "llama", "deepseek_r1": "deepseek_v3",
    "deepseek_r1_distill_llama": "llama", "deepseek_r1_distill_qwen": "qwen2", "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3", "dots1": "dots1", "ernie4_5": "ernie4_5", "ernie4_5_moe": "ernie4_5_moe",
    "exaone4": "exaone4", "falcon": "falcon", "falcon3": "llama", "falcon_h1": "falcon_h1", "falcon_mamba": "falcon_mamba",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma3_vl": "gemma3", "gemma3n": "gemma3n",
    "gemma4": "gemma4", "glm4": "glm4", "glm4_moe": "glm4_moe", "glm4_moe_lite": "glm4_moe_lite", "glm_4": "glm",
    "glm_z1": "glm4", "gpt2": "gpt2", "gpt_oss": "gpt_oss", "granite3": "granite", "granite4": "granitemoehybrid",
    "granitemoe": "granitemoe", "helium": "helium", "hunyuan": "hunyuan_v1_dense", "hunyuan_moe": "hunyuan_v1_moe",
    "jamba": "jamba", "lfm2": "lfm2", "lfm2_moe": "lfm2_moe", "llama2": "llama", "llama3": "llama", "llama4": "llama4",
    "llava": "llava", "mamba": "mamba", "mamba2": "mamba2", "minicpm3": "minicpm3", "minimax_m2": "minimax_m2",
    "ministral": "mistral", "mistral": "mistral", "mistral3": "mistral3", "mixtral": "mixtral", "moonlight": "deepseek_v3",
    "nemotron": "nemotron", "nemotron_h": "nemotron_h", "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo3",
    "olmoe": "olmoe", "openchat": "mistral", "opencoder": "llama", "opt": "opt", "phi1_5": "phi", "phi2": "phi",
    "phi3": "phi3", "phi4": "phi3", "phimoe": "phimoe", "pythia": "gpt_neox", "qwen1_5": "qwen2",
    "qwen1_5_moe": "qwen2_moe", "qwen2": "qwen2", "qwen2_5": "qwen2", "qwen2_5_vl": "qwen2_5_vl", "qwen2_vl": "qwen2_vl",
    "qwen3": "qwen3", "qwen3_5": "qwen3_5", "qwen3_5_moe": "qwen3_5_moe", "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next", "qwen3_vl": "qwen3_vl", "qwq": "qwen2", "recurrent_gemma": "recurrent_gemma",
    "seed_coder": "llama", "seed_oss": "seed_oss", "smollm": "llama", "smollm2": "llama", "smollm3": "smollm3",
    "solar": "llama", "stablelm2": "stablelm", "starcoder2": "starcoder2", "tinyllama": "llama", "vicuna": "llama",
    "yi1_5": "llama", "zephyr": "mistral", "internvl3": "internvl", "glm4_1v": "glm4v", "glm4_5v": "glm4v_moe",
    "llava_next": "llava_next", "llava_onevision": "llava_onevision", "aya_vision": "aya_vision",
    "command_a_vision": "cohere2_vision", "smolvlm": "idefics3", "smolvlm2": "smolvlm", "lfm2_vl": "lfm2_vl",
}  # fmt: skip
"""By the start of a name: the model_type in the checkpoint's config.json. The longest start counts."""
CONV = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
LAYERS = {"lfm2": CONV, "lfm2_moe": CONV, "lfm2_vl": {"text_config": {"model_type": "lfm2", **CONV}}}
"""Where a config without entries has other layers than the checkpoints."""
NOT_TRAINED = {"gemma3n": "its towers are another package's (timm)"}
"""What has several media and is not among those that are trained on text."""
HEAD = """\
# Models

`model=NAME` is a short name for a checkpoint on the hub; `model=hub model.path=...` takes any other checkpoint, or a folder.
Whether a model can be trained depends on its architecture (the `model_type` of its `config.json`), not on this list.

- `in packs` means `data.packing=true`, the default.
- `unpacked` means that the model needs `data.packing=false`. Its layers carry a state from token to token, or compute
  attention in their own way, so they would mix the rows of a pack. Each row then has its own row of the batch, with padding at
  its end, and transformers' own layers compute it. Such a model generates with `engine=hf`.

Tests compare both with transformers on small models with random weights. A model that fits neither is refused.

A model with its own Python code, which transformers does not include, needs `model.trust_remote_code=true`. The code then runs
with your rights, and each command that loads it prints a warning. If the code computes attention through transformers' interface,
rows are packed; if not, each row has its own row of the batch, which assumes that the model is causal. The code must have the
same interface as transformers' models: a config class, a backbone that takes `inputs_embeds`, `get_input_embeddings`,
`get_output_embeddings`, and `_no_split_modules`, which names the class of its layers. A model that lacks one of these (ChatGLM's
backbone takes only token ids) is refused.

`model.positions=16384 model.rope_scaling=yarn` (or `linear`, `dynamic`, `llama3`) scales the positions of a model that has fewer,
by the smallest integer factor that suffices. If the model already has a scaling of the same kind, its other parameters are kept.
One with a linear scaling can only get another linear one, unless its config has its original positions.
`model.config.rope_scaling` sets the parameters of a scaling instead. A row has the same positions in a pack as by itself.
LongRoPE has two sets of frequencies and chooses one by the longest row of a batch, so `data.max_length` must not exceed the
positions of the first set.

`model.shift_attn_tokens=4096` trains long rows with S2 attention (LongLoRA, Chen et al. 2023): tokens attend within groups of
this many tokens, and for half of the heads, groups are shifted by half a group. Groups start at each row's first token, in packs
too, and the first half group never attends to the row's end. Evaluations and the saved model use full attention. It is refused
for models with a sliding window, a recurrent state or attention sinks in a layer, with a reference (DPO, KTO), and with
`train.cuda_graphs`.

Most layers of Llama 4 attend within chunks of 8,192 tokens, and its other layers change attention scores from there on by a
token's position in its pack. Up to 8,191 tokens (`data.max_length`) both are plain attention, so that is the limit.

`adapter.targets=all-linear` leaves out routers that are linear layers, and all layers of state-space mixers (Mamba) except
`in_proj`, since their kernels read weights directly and would ignore an adapter.

The column `template by name` has the template that `data.template=null` uses if the tokenizer has no chat template of its own, as
is common for base models. If the column is empty, set `data.template`.

`python -m tests.pages` writes this page from `conf/model` and from the rules that runs are checked by.

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
    """In packs, in lines, or why not at all."""
    config = AutoConfig.for_model(model_type, **LAYERS.get(model_type, {}))
    try:
        check_trainable(config)
        known = model_class(config)
        assert known is not None
        check_isolation(config, known)
    except ConfigError as error:
        return f"no: {NOT_TRAINED.get(model_type) or error.rule.rpartition(': ')[2]}"
    return "unpacked" if needs_lines(config, known) else "in packs"
