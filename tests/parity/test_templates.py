"""Every named template against recorded LLaMA-Factory 0.9.5 texts, rendered by transformers as a saved chat template is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from itertools import chain
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from raytune_llm.data.templates.named import NamedTemplate, apply_to_tokenizer, load, names, stop_tokens
from raytune_llm.data.templates.tool_calls import parse_call_turn, render_calls
from raytune_llm.errors import ConfigError
from tests.parity.sets import recorded

UNMARKED = {f"{name}/tool_format=None/default_system=None" for name in ("glm4_moe", "minimax2", "seed_oss")}
"""Rows that hold a call as those three wrongly write it, like others that are marked as defects."""
NUM_TEMPLATES = 121
"""That 0.9.5 registers."""
ROLES = {"user": "user", "assistant": "assistant", "function": "assistant", "observation": "tool"}


@lru_cache(maxsize=1)
def cases() -> dict[str, list[dict[str, Any]]]:
    """The recorded renderings of each template."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names()}
    for row in chain.from_iterable(map(recorded, ("templates", "templates_minimal", "template_overrides"))):
        found[row["template"]].append(row)
    return found


def is_defect(row: Mapping[str, Any]) -> bool:
    return "defect" in row or row["id"] in UNMARKED


def chat(row: Mapping[str, Any], template: NamedTemplate) -> list[dict[str, Any]]:
    """The row's messages as transformers takes them."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": row["system"]}] if row["system"] else []
    for message in row["messages"]:
        content, calls = message["content"], ()
        if message["role"] == "function":
            content, calls = parse_call_turn(content, thought=template.thought, call_words=template.tool_call_words)
        messages.append({"role": ROLES[message["role"]], "content": content})
        if calls:
            messages[-1]["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return messages


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {key: row[key] for key in ("bos_token", "eos_token") if row.get(key)}
    return tokens | {
        "tools": json.loads(row["tools"]) if row["tools"] else None,
        "enable_thinking": row.get("enable_thinking", True),
        "preserve_thinking": row.get("preserve_thinking", False),
        "train_history": row.get("api", "multiturn") == "multiturn" and not row.get("discard_history_thought", False),
    }


def named(row: Mapping[str, Any]) -> NamedTemplate:
    today = f"{date.fromisoformat(row['now']):%d %b %Y}" if "now" in row else None
    return load(row["template"], default_system=row.get("default_system"), tool_format=row.get("tool_format"), date=today)


def rendered(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The whole conversation, cut before and after each answer."""
    template = named(row)
    result: Any = render_jinja_template(
        [chat(row, template)], chat_template=template.source, return_assistant_tokens_mask=True, **settings(row)
    )
    [text], [spans] = result
    starts = [0, *(end for _, end in spans)]
    assert starts[-1] == len(text)
    return [(text[before:start], text[start:end]) for before, (start, end) in zip(starts, spans, strict=False)]


def prompt(row: Mapping[str, Any]) -> str:
    template = named(row)
    return render_jinja_template(
        [chat(row, template)], chat_template=template.source, add_generation_prompt=True, **settings(row)
    )[0][0]


@pytest.mark.parametrize("name", names())
def test_text_and_trained_spans_are_those_recorded(name):
    assert cases()[name]
    assert [row["id"] for row in cases()[name] if not is_defect(row) and actual(row) != expected(row)] == []


def expected(row: Mapping[str, Any]) -> list[tuple[str, str]] | str:
    if "error" in row["expected"]:
        return "refused"
    if row.get("api") == "inference":
        return row["expected"]["prompt"]["text"]
    return [(pair["prompt"]["text"], pair["response"]["text"]) for pair in row["expected"]["pairs"]]


def actual(row: Mapping[str, Any]) -> list[tuple[str, str]] | str:
    try:
        if row.get("api") == "inference":
            return prompt(row)
        *earlier, last = rendered(row)
    except (ConfigError, jinja2.TemplateError, ValueError):
        return "refused"
    if row.get("api") == "oneturn":
        return [("".join(map("".join, earlier)) + last[0], last[1])]
    return [*earlier, last]


@pytest.mark.parametrize("name", [name for name, rows in cases().items() if any(map(is_defect, rows))])
def test_defects_are_not_repeated(name):
    for row in filter(is_defect, cases()[name]):
        template = named(row)
        text = prompt(row) if row.get("api") == "inference" else "".join(map("".join, rendered(row)))
        for message in chat(row, template):
            content = message["content"]
            if template.reasons and template.thought[0] in content:
                _, content = content.split(template.thought[1])
            assert content in text, f"{row['id']}: what was typed is there as it was typed"
            if calls := [call["function"] for call in message.get("tool_calls", ())]:
                assert render_calls(template.tool_format, calls) in text, row["id"]


def test_the_settings_of_every_template_are_those_recorded():
    meta = {row["template"]: row for row in recorded("template_meta")}
    assert len(meta) >= 20 and set(names()) >= set(meta)
    assert len(names()) == NUM_TEMPLATES
    for name in meta:
        template, row = load(name), meta[name]
        assert (template.default_system, list(template.stop_tokens)) == (row["default_system"], row["stop_words"])
        assert (template.efficient_eos, template.replace_eos) == (row["efficient_eos"], row["replace_eos"])
        assert (list(template.thought), list(template.tool_call_words)) == (row["thought_words"], row["tool_call_words"])
        assert template.reasons == row["class"].startswith("reasoning")
        assert [template.image_token, template.video_token, template.audio_token] == [
            row[f"{kind}_token"] for kind in ("image", "video", "audio")
        ]


@pytest.mark.parametrize("row", recorded("template_exports"), ids=lambda row: row["id"])
def test_a_saved_template_gives_the_text_that_was_trained(row):
    turns = [("user", "Hi"), ("assistant", "Hello! How can I help?")]
    longer = [*turns, ("user", "What is 2+2?"), ("assistant", "4"), ("user", "And 3*3?"), ("assistant", "9")]
    template = load(row["template"])
    for key, conversation in (("single", turns), ("turns3_system", [("system", "You are a terse helper."), *longer])):
        text = render_jinja_template(
            [[{"role": role, "content": content} for role, content in conversation]],
            chat_template=template.source,
            bos_token=row["bos_token"],
            eos_token=row["eos_token"],
        )[0][0]
        blank = "".join(template.thought)
        assert (text.replace(blank, "").replace(template.thought[1], "") if template.reasons else text) == row["jinja"][key]


@pytest.mark.parametrize("row", recorded("template_meta"), ids=lambda row: row["id"])
def test_end_padding_and_stop_tokens_of_a_tokenizer_are_those_recorded(row):
    # SmolLM2's tokens, as far as templates name them.
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "###"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>")),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    template = load(row["template"])
    added = apply_to_tokenizer(tokenizer, template)
    after = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token")}
    stops = sorted(stop_tokens(tokenizer, template))
    assert after | {"added_tokens": list(added), "stop_tokens": stops} == row["smollm2_after_fix"]
