"""Named chat templates, for models without one of their own. They have LLaMA-Factory's names and reproduce its text exactly.

A template is a Jinja file in templates/. A YAML comment at its head has its settings, the rest has the text around each turn.
Rules that all templates share are in templates/turns.jinja and templates/tools/. `load` joins these to one self-contained source,
which can be saved as the tokenizer's chat template. Its variables are those that transformers passes to chat templates, and a few
more:

    messages, tools, add_generation_prompt, bos_token, eos_token (left out, not None, if the tokenizer has none)
    enable_thinking     true (the default): an answer keeps its reasoning, or gets an empty reasoning block, which is trained;
                        false: no reasoning, and an empty block in the prompt; none: reasoning if there is any, else as false
    preserve_thinking   keep the reasoning of earlier answers, which is removed by default
    train_history       treat every answer like the last one, for training on all turns

Text that the model generates is between {% generation %} tags, from which transformers returns the trained spans.
Some oddities are kept for models that were trained with them: the "default" tool text follows the system text without a
separator, vicuna and the llava family have no space before the first "USER:", and qwen's tool text starts with two newlines.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raytune_llm.data.templates.tool_calls import EXTRACTORS
from raytune_llm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    name: str
    source: str
    """The complete Jinja source, which can be saved as the tokenizer's chat template."""
    stop_tokens: tuple[str, ...]
    """Tokens that end an answer, in addition to the tokenizer's end token."""
    default_system: str
    tool_format: str
    replace_eos: bool
    """The first stop token becomes the tokenizer's end token."""
    efficient_eos: bool
    """The text has no end token after answers, so the tokenizer's is trained after the last one."""
    reasons: bool
    """The template handles reasoning as enable_thinking says. If not, reasoning is plain text."""
    thought: tuple[str, str]
    tool_call_words: tuple[str, str]
    """The texts around JSON tool calls in data for LLaMA-Factory."""
    image_token: str | None
    video_token: str | None
    audio_token: str | None
    control_tokens: tuple[str, ...]
    """Control tokens of the template, which are escaped in a user's text. Longest first."""


MODELS: tuple[tuple[str, str], ...] = (
    # Derived models name their parent too, so they come first.
    (r"deepseek-r1-distill|deepseek-r1", "deepseekr1"),
    (r"deepseek-v?(2-5|3)", "deepseek3"),
    (r"deepseek-coder-v2|deepseek-(llm|v2|math|moe)", "deepseek"),
    (r"deepseek-coder", "deepseekcoder"),
    (r"llava-(v?1-6|next)-video.*mistral|llava-next-video.*mistral", "llava_next_video_mistral"),
    (r"llava-next-video.*(yi|34b)", "llava_next_video_yi"),
    (r"video-llava", "video_llava"),
    (r"llava-next-video", "llava_next_video"),
    (r"llava-(v1-6|next).*mistral", "llava_next_mistral"),
    (r"llava-(v1-6|next).*llama3|llama3-llava-next", "llava_next_llama3"),
    (r"llava-next-(72b|110b)", "llava_next_qwen"),
    (r"llava-(v1-6|next).*34b", "llava_next_yi"),
    (r"llava-(v1-6|next)", "llava_next"),
    (r"llava", "llava"),
    (r"openchat-3-6", "openchat-3.6"),
    (r"openchat", "openchat"),
    (r"minicpm-v-4-6", "minicpm_v_4_6"),
    (r"minicpm-v", "minicpm_v"),
    (r"minicpm-o", "minicpm_o"),
    (r"minicpm4|minicpm-4", "cpm4"),
    (r"qwen2-audio", "qwen2_audio"),
    (r"qwen2-5-omni", "qwen2_omni"),
    (r"qwen3-omni.*instruct", "qwen3_omni_nothink"),
    (r"qwen3-omni", "qwen3_omni"),
    (r"(qwen2|qwen2-5)-vl|qvq", "qwen2_vl"),
    (r"qwen3-vl.*instruct", "qwen3_vl_nothink"),
    (r"qwen3-vl", "qwen3_vl"),
    (r"qwen3-5", "qwen3_5"),
    (r"qwen3-6", "qwen3_6"),
    (r"qwen3.*(instruct|coder)", "qwen3_nothink"),
    (r"qwen3|qwq", "qwen3"),
    (r"qwen", "qwen"),
    (r"llama-?4(-|$)", "llama4"),
    (r"llama-?3-2.*vision|mllama", "mllama"),
    (r"llama-?3(-|$)", "llama3"),
    (r"chinese.*(llama|alpaca)-2", "llama2_zh"),
    (r"llama-?2(-|$)", "llama2"),
    (r"pixtral", "pixtral"),
    (r"ministral-?3", "ministral3"),
    (r"ministral|mistral-nemo", "ministral"),
    (r"mistral-small", "mistral_small"),
    (r"zephyr", "zephyr"),
    (r"breeze", "breeze"),
    (r"mistral|mixtral", "mistral"),
    (r"paligemma.*(chat|mix)", "paligemma_chat"),
    (r"paligemma", "paligemma"),
    (r"gemma-?4n|gemma-?4-e\d", "gemma4n"),
    (r"gemma-?4", "gemma4"),
    (r"gemma-?3n", "gemma3n"),
    (r"gemma-?3", "gemma3"),
    (r"gemma-?2(-|$)", "gemma2"),
    (r"gemma", "gemma"),
    (r"phi-?3-small", "phi_small"),
    (r"phi-?4-mini", "phi4_mini"),
    (r"phi-?4", "phi4"),
    (r"phi-?3", "phi"),
    (r"chatglm3", "chatglm3"),
    (r"glm-?ocr", "glm_ocr"),
    (r"glm-?4-5v|glm4v-moe", "glm4_5v"),
    (r"glm-?4-1v|glm-?4v", "glm4v"),
    (r"glm-?4-7", "glm4_7"),
    (r"glm-?4-[56]|glm4-moe", "glm4_moe"),
    (r"glm-?z1", "glmz1"),
    (r"glm-?4", "glm4"),
    (r"gpt-oss", "gpt_oss"),
    (r"granite.*vision", "granite3_vision"),
    (r"granite-?4", "granite4"),
    (r"granite-?3", "granite3"),
    (r"yi-vl", "yi_vl"),
    (r"^yi-", "yi"),
    (r"internvl", "intern_vl"),
    (r"intern-?s1", "intern_s1"),
    (r"internlm[23]", "intern2"),
    (r"hunyuan-(0-5b|1-8b|4b|7b)", "hunyuan_small"),
    (r"hunyuan", "hunyuan"),
    (r"^hy-?3", "hy3"),
    (r"kimi-vl", "kimi_vl"),
    (r"moonlight", "moonlight"),
    (r"keye", "keye_vl"),
    (r"lfm2.*vl", "lfm2_vl"),
    (r"lfm2", "lfm2"),
    (r"minimax-?m2", "minimax2"),
    (r"minimax", "minimax1"),
    (r"mimo-?v2", "mimo_v2"),
    (r"mimo-?vl", "mimo_vl"),
    (r"mimo", "mimo"),
    (r"(^|-)[lr]ing-|bailing-?moe-?v2", "bailing_v2"),
    (r"bailing", "bailing"),
    (r"ernie.*vl", "ernie_vl"),
    (r"ernie.*thinking", "ernie"),
    (r"ernie", "ernie_nothink"),
    (r"seed-?oss", "seed_oss"),
    (r"seed-?coder", "seed_coder"),
    (r"smollm2", "smollm2"),
    (r"smollm", "smollm"),
    (r"falcon-?h1", "falcon_h1"),
    (r"falcon", "falcon"),
    (r"youtu.*vl", "youtu_vl"),
    (r"youtu", "youtu"),
    (r"c4ai|command-r|cohere", "cohere"),
    (r"dots-?ocr", "dots_ocr"),
    (r"^index-", "index"),
    (r"olmo", "olmo"),
    (r"opencoder", "opencoder"),
    (r"sailor", "sailor"),
    (r"solar", "solar"),
    (r"starchat|starcoder2.*chat", "starchat"),
    (r"telechat", "telechat2"),
    (r"vicuna", "vicuna"),
    (r"xuanyuan", "xuanyuan"),
    (r"yuan2", "yuan"),
    (r"exaone", "exaone"),
    (r"dbrx", "dbrx"),
)
"""(pattern, template): the first pattern that occurs in the last part of a model's path determines its template."""


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja") if path.name != "turns.jinja"))


@lru_cache(maxsize=256)
def load(
    name: str, *, default_system: str | None = None, tool_format: str | None = None, date: str | None = None
) -> NamedTemplate:
    """The template of that name.

    default_system: the system text of conversations without one, instead of the template's own ("" for none). tool_format:
    another way to declare and call tools. date: the date that llama3 writes when there are tools, such as 31 Jan 2025.
    """
    if name not in names():
        raise ConfigError("data.template", "must be the name of a template", got=name, fix=_suggestion(name))
    if tool_format is not None and tool_format not in EXTRACTORS:
        raise ConfigError("data.tool_format", f"must be one of {', '.join(EXTRACTORS)}", got=tool_format)
    head, shape = _read(name)
    system = head.get("default_system", "") if default_system is None else default_system
    format_name = tool_format or head["tool_format"]
    thought = head.get("thought", ["<think>\n", "\n</think>\n\n"])
    settings: dict[str, Any] = {
        "default_system": system,
        "tool_format": format_name,
        "thought": thought,
        "empty_thought": head.get("empty_thought", "".join(thought)),
        "reasons": head.get("reasons", False),
    }
    if date is not None:
        settings["date"] = date
    tools = (FOLDER / "tools" / f"{format_name}.jinja").read_text(encoding="utf-8")
    turns = (FOLDER / "turns.jinja").read_text(encoding="utf-8")
    return NamedTemplate(
        name=name,
        source="".join(f"{{%- set {key} = {_literal(value)} %}}\n" for key, value in settings.items())
        + tools
        + shape.replace('{%- include "turns.jinja" %}\n', _without_comments(turns)),
        stop_tokens=tuple(head.get("stop", ())),
        default_system=system,
        tool_format=format_name,
        replace_eos=head.get("replace_eos", False),
        efficient_eos=head.get("efficient_eos", False),
        reasons=settings["reasons"],
        thought=tuple(thought),
        tool_call_words=tuple(head.get("tool_call_words", ("<tool_call>", "</tool_call>"))),
        image_token=head.get("image_token"),
        video_token=head.get("video_token"),
        audio_token=head.get("audio_token"),
        control_tokens=_control_tokens(head, shape, tools, thought),
    )


def guess(model: str) -> str | None:
    """The template for a model, by its path, hub id or model_type. None if that is ambiguous, as "llama" is."""
    last = re.sub(r"[\s_.]+", "-", model.rstrip("/").rsplit("/", 1)[-1].lower())
    return next((template for pattern, template in MODELS if re.search(pattern, last)), None)


def apply_to_tokenizer(tokenizer: PreTrainedTokenizerBase, template: NamedTemplate) -> tuple[str, ...]:
    """Gives the tokenizer the template's end and stop tokens and its chat template. Returns the tokens that are new to it.

    The first stop token becomes the end token where the template says so, all others become special tokens.
    A missing end token becomes <|endoftext|>, a missing padding token the end token.
    New tokens need rows in the model's embedding.
    """
    known = tokenizer.get_vocab()
    stops = list(template.stop_tokens)
    if template.replace_eos:
        tokenizer.add_special_tokens({"eos_token": stops.pop(0)})
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stops:
        tokenizer.add_special_tokens({"extra_special_tokens": stops}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template.source
    return tuple(sorted(tokenizer.get_vocab().keys() - known.keys()))


def stop_tokens(tokenizer: PreTrainedTokenizerBase, template: NamedTemplate) -> tuple[str, ...]:
    """The tokens that end an answer: the tokenizer's end token and the template's stop tokens."""
    return tuple(dict.fromkeys((str(tokenizer.eos_token), *template.stop_tokens)))


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else "raytune_llm/data/templates/ has one file a name."


def _read(name: str) -> tuple[dict[str, Any], str]:
    """The settings of a template's file and the rest of it."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    head, _, shape = text.removeprefix("{#-").partition("-#}\n")
    return yaml.safe_load(head), shape


def _without_comments(text: str) -> str:
    return re.sub(r"\{#.*?#\}\n?", "", text, flags=re.DOTALL)


def _literal(value: Any) -> str:
    """A setting's value as a Jinja literal."""
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(_literal(item) for item in value)}]"
        case _:
            return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'


_MARKER = re.compile(r"<[^<>\s]+>|\[[|/]?[A-Za-z_]+\|?\]|◁[^▷]+▷|\]~!b\[|\]~b\]|\[e~\[|reserved_\d")
"""A control token as templates write them: <|im_end|>, </think>, [INST], [|user|], ◁think▷, ]~b]."""


def _control_tokens(head: dict[str, Any], shape: str, tools: str, thought: Sequence[str]) -> tuple[str, ...]:
    turns = re.findall(r"\{%- set .*? %\}\n", shape)
    calls = tools.partition("macro call_text")[2].replace('\\"', '"')
    stops = head.get("stop", ())
    words = thought if head.get("reasons") else ()
    markers = {marker for text in (*turns, calls, *words) for marker in _MARKER.findall(text)}
    return tuple(sorted(markers.union(stops), key=lambda token: (-len(token), token)))
