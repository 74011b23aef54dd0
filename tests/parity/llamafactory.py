"""LLaMA-Factory's records and labels, as recorded, beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from raytune_llm.config.data import DataConfig
from raytune_llm.config.load import load_config
from raytune_llm.data import pipeline
from raytune_llm.data.shards import Recipe, Shortened, made_rows
from raytune_llm.data.templates.tool_calls import name_and_arguments, parse_call_turn
from raytune_llm.data.tokens.tokenize import BlockTokenizer
from raytune_llm.records import Conversation, Labeled, Message, Pair, Record, Text

IGNORE = -100
"""LLaMA-Factory's label of a token that is not trained."""
KIND_OF_STAGE = {"sft": "conversations", "rm": "pairs", "kto": "labeled", "pt": "text", "predict": "prompts", "ppo": "prompts"}


def unified(record: Record) -> dict[str, Any]:
    """A record of ours as LLaMA-Factory writes it. Calls and tools as objects, not as JSON text."""
    match record:
        case Text(text=text):
            return {"_prompt": [{"role": "user", "content": text}], "_response": [], "_system": "", "_tools": []}
        case Pair(prompt=conversation, chosen=chosen, rejected=rejected):
            prompt, responses = conversation.messages, [*chosen, *rejected]
        case Labeled(conversation=conversation, desirable=desirable):
            *prompt, last = conversation.messages
            responses = [last, Message("assistant", "")] if desirable else [Message("assistant", ""), last]
        case Conversation():
            conversation = record
            *prompt, last = conversation.messages
            responses = [last]
            if last.role != "assistant":
                prompt, responses = conversation.messages, []
    system = ""
    if prompt and prompt[0].role == "system":
        system, prompt = prompt[0].content, prompt[1:]
    media = {f"_{name}": list(getattr(conversation.media, name)) or None for name in ("images", "videos", "audios")}
    return {
        "_prompt": [_turn(message) for message in prompt],
        "_response": [_turn(message) for message in responses],
        "_system": system,
        "_tools": list(conversation.tools),
        **media,
    }


def _turn(message: Message) -> dict[str, Any]:
    if message.tool_calls:
        calls = [dict(zip(("name", "arguments"), name_and_arguments(call), strict=True)) for call in message.tool_calls]
        return {"role": "function", "content": message.content, "calls": calls}
    return {"role": {"tool": "observation"}.get(message.role, message.role), "content": message.content}


def wanted(expected: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded record in the same form, without what LLaMA-Factory adds to system texts."""

    def turn(message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] == "function":
            text, calls = parse_call_turn(message["content"])
            return {"role": "function", "content": text, "calls": list(calls)}
        return dict(message)

    tools = expected["_tools"]
    return {
        **expected,
        "_prompt": [turn(message) for message in expected["_prompt"]],
        "_response": [turn(message) for message in expected["_response"]],
        "_tools": json.loads(tools) if isinstance(tools, str) and tools else tools or [],
    }


def record_of(row: Mapping[str, Any], stage: str, template: Any) -> Record:
    """Ours from a recorded one."""

    def message(turn: Mapping[str, Any]) -> Message:
        if turn["role"] == "function":
            markers = {} if template is None else {"thought": template.thought, "call_words": template.tool_call_words}
            text, calls = parse_call_turn(turn["content"], **markers)
            return Message("assistant", text, trained=True, tool_calls=calls)
        role: Any = {"observation": "tool"}.get(turn["role"], turn["role"])
        return Message(role, turn["content"], trained=role == "assistant")

    system = (Message("system", row["_system"]),) if row["_system"] else ()
    tools = tuple(json.loads(row["_tools"])) if row["_tools"] else ()
    prompt = Conversation((*system, *map(message, row["_prompt"])), tools)
    responses = [(message(turn),) for turn in row["_response"]]
    match stage, responses:
        case "rm", [chosen, rejected, *_]:
            return Pair(prompt, chosen, rejected)
        case "kto", [first, second]:
            desirable = bool(first[0].content)
            return Labeled(Conversation((*prompt.messages, *(first if desirable else second)), tools), desirable)
        case _, [answer]:
            return Conversation((*prompt.messages, *answer), tools)
    return prompt


@lru_cache(maxsize=64)
def recipe(stage: str, **settings: Any) -> Recipe:
    """How a run with these settings of `data` makes rows of SmolLM2's tokens from records."""
    overrides = [
        f"data.{name}={'null' if value is None else json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()
    ]
    model = ["model=tiny_random", "model.tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct"]  # as many embeddings as tokens
    run = load_config("prepare", [*model, "data.path=rows.jsonl", "data.overlong=llamafactory", *overrides])
    return recipe_of(stage, run.model, run.data)


def recipe_for(case: Mapping[str, Any]) -> Recipe:
    """Of a case of labels.jsonl."""
    stage = case["stage"]
    settings = {name: value for name, value in case["args"].items() if not name.startswith("packing")}
    settings |= {"template": None if stage == "pt" else case["template"], "max_length": case["effective_cutoff_len"]}
    settings |= {"enable_thinking": case["enable_thinking"], "today": "31 Jan 2025"}
    if stage == "pt":
        settings["packing"] = "no_packing" not in case["id"]
    ours = recipe(stage, **settings)
    if case.get("tokenizer_add_bos_token"):
        ours = replace(ours, targets=replace(ours.targets, text_start=case["tokenizer"]["bos_token_id"]))
    return ours


def recipe_of(stage: str, model: Any, data: DataConfig) -> Recipe:
    preprocessor = pipeline.preprocessor_of(model, data, KIND_OF_STAGE[stage])
    return Recipe(
        preprocessor.kind,
        (),
        lambda record: record,
        preprocessor.renderer,
        BlockTokenizer(preprocessor.tokenizer),
        preprocessor.targets,
    )


def template_of(stage: str, recipe: Recipe) -> Any:
    return getattr(recipe.renderer, "template", None)


def rows_of(recipe: Recipe, records: Sequence[Record]) -> list[Any]:
    """In the order of the records."""
    made = sorted(made_rows(list(enumerate(records)), recipe), key=lambda numbered: numbered[0])
    return [row.row if isinstance(row, Shortened) else row for _, row in made]


def labels_of(ids: Sequence[int], spans: Sequence[int], end_of_row: int | None) -> list[int]:
    """A label beside each id, not shifted."""
    labels = [IGNORE] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
        if end_of_row is not None:
            labels[end - 1] = end_of_row
    return labels
