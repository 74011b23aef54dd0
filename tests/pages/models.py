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

`model=NAME` takes a checkpoint of the hub by a short name; `model=hub model.path=...` takes any other, or a folder. What
decides whether a model can be trained is its architecture, the `model_type` of its `config.json`, not whether it is listed here.

`in packs` is `data.packing=true`, the default. `a row a line` needs `data.packing=false`: layers that carry a state from token to
token, or that compute attention in a way of their own, know no boundaries between the rows of a pack, so each row has a line of
its batch for itself, padded at its end, and transformers' own layers compute it. Such a model generates with `engine=hf`. Both
are held against transformers by tests on small models with random weights; what neither fits is refused by name.

A model that transformers has not, and that comes with its own code, needs `model.trust_remote_code=true`: its Python code then
runs with your rights, which each command that loads it says. If the code computes attention by transformers' interface, rows are
packed; if not, a row has a line for itself, which supposes that the model is causal. The code must have what transformers' models
have: a config class, a backbone that takes `inputs_embeds`, `get_input_embeddings`, `get_output_embeddings`, and
`_no_split_modules`, which names the class of its layers. What lacks one (ChatGLM's backbone takes token ids alone) is refused by
name.

`model.positions=16384 model.rope_scaling=yarn` (or `linear`, `dynamic`, `llama3`) stretches a model that has fewer positions,
by the smallest whole factor that suffices; `model.config.rope_scaling` sets a scaling's numbers instead. Scaled positions are
computed in packs as alone. LongRoPE has two sets of frequencies, chosen by the longest row of a batch, so `data.max_length`
must stay within the positions of the first.

`model.shift_attn_tokens=4096` trains long rows with S2 attention (LongLoRA, Chen et al. 2023): within groups of so many tokens,
which begin half a group later for half of the heads. Groups are counted from each row's first token, in packs as alone, and the
first half group never sees the row's end. Evaluations and the saved model attend to all. It is refused for models of which a
layer has a window, a state or sinks, with a reference (DPO, KTO), and with `train.cuda_graphs`.

Llama 4 attends within chunks of 8,192 tokens in most layers, and in the others more sharply from there on by a token's place in
its pack. Up to 8,191 tokens (`data.max_length`) both are plain attention, so that is the limit here.

An adapter on all linear layers leaves out routers that are linear layers, and of state-space mixers (Mamba) all but `in_proj`,
since their kernels read the weights of the others past any adapter.

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
    """In packs, in lines, or why not at all."""
    config = AutoConfig.for_model(model_type, **LAYERS.get(model_type, {}))
    try:
        check_trainable(config)
        known = model_class(config)
        assert known is not None
        check_isolation(config, known)
    except ConfigError as error:
        return f"no: {NOT_TRAINED.get(model_type) or error.rule.rpartition(': ')[2]}"
    return "a row a line" if needs_lines(config, known) else "in packs"
