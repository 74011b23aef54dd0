"""The rows of a data set as prompts, with their reference answers if they have any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from raytune_llm.config.data import DataConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.dropped import BadRow, Dropped, RefusedRow
from raytune_llm.data.pipeline import chunks_of, preprocessor_of, recipe_of
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.chunks import Chunk
from raytune_llm.data.readers.declarations import declared, source_of
from raytune_llm.data.shards import BLOCK_ROWS, Recipe, made_rows
from raytune_llm.data.tokens.tokenize import BlockTokenizer
from raytune_llm.data.tokens.tokenizer import stop_ids
from raytune_llm.errors import DataError
from raytune_llm.records import Conversation, Labeled, Message, Pair

KIND = "prompts"
UNBOUNDED = 2**31 - 1
"""Prompts are not truncated here; the engine refuses those that are too long."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    number: int
    """Row number in the data, from 1."""
    where: str
    columns: Mapping[str, Any]
    """The row's columns as they are in the data."""
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()
    """The given answer with its stop tokens; only these if the data give none."""
    bad: str | None = None
    """Why the row can't be rendered."""


class PromptRows:
    """The rows of all data sets, in order. Can be iterated over repeatedly."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        """Raises ConfigError or DataError if there is nothing to read."""
        preprocessor = preprocessor_of(model, data, KIND)
        self.tokenizer = preprocessor.tokenizer
        self.end_ids = stop_ids(preprocessor.tokenizer, preprocessor.template)
        preprocessor = replace(preprocessor, targets=replace(preprocessor.targets, max_length=UNBOUNDED))
        self._parts: list[tuple[Recipe, list[Chunk]]] = []
        self.fingerprints: list[str] = []
        """One hash of the contents per data set."""
        self._data = data
        for one in declared(data, ranked=False):
            source = source_of(one)
            self.fingerprints.append(sources.fingerprint(source))
            self._parts.append((recipe_of(one, source, preprocessor, data), chunks_of(one, source, data)))

    def __iter__(self) -> Iterator[PromptRow]:
        number = 0
        for recipe, chunks in self._parts:
            for chunk in chunks:
                read = sources.read(chunk)
                while block := list(islice(read, BLOCK_ROWS)):
                    yield from _asked(block, chunk, recipe, number)
                    number += len(block)

    def with_answers(self, answers: Iterator[str | None] | None) -> Iterator[tuple[int, ...] | None]:
        """Token ids of each row's whole conversation, with this text in place of the given answer; None: the given one. None is
        given for a row that has no such answer, or can't be rendered."""
        for recipe, chunks in self._parts:
            answered = replace(recipe, convert=lambda pair, convert=recipe.convert: _answered(pair, convert))
            for chunk in chunks:
                read = sources.read(chunk)
                while block := list(islice(read, BLOCK_ROWS)):
                    texts = [None] * len(block) if answers is None else list(islice(answers, len(block)))
                    pairs = [(row, text) for (_, row), text in zip(block, texts, strict=True)]
                    made = dict(made_rows(list(enumerate(pairs)), answered))
                    for number, text in enumerate(texts):
                        lacks = answers is not None and text is None
                        yield None if lacks or isinstance(made[number], BadRow | RefusedRow) else _whole(made[number])

    def check(self, max_prompt_tokens: int | None) -> int:
        """The number of rows. Raises DataError if too many can't be rendered, or have too long a prompt."""
        bad, number = Dropped(), 0
        for row in self:
            number = row.number
            reason = row.bad
            if reason is None and max_prompt_tokens is not None and len(row.prompt_ids) > max_prompt_tokens:
                reason = f"the prompt is longer than {max_prompt_tokens} tokens"
            if reason is not None:
                bad.add(reason, "", row.where)
        if number == 0 or bad.total > self._data.max_bad_fraction * number:
            place = self._data.path or str(self._data.dataset_info)
            problem = f"{bad.total} of {number} rows can't be asked, more than data.max_bad_fraction of them. {bad}"
            raise DataError(place, problem if number else "holds no rows", "Correct the data, or data.format.")
        return number


class ConversationPrompts:
    """Renders conversations that lack an answer to prompt token ids, as in training."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        """data: of it, the settings of the chat template are used."""
        preprocessor = preprocessor_of(model, data, KIND)
        self.tokenizer = preprocessor.tokenizer
        self.default_system = data.default_system
        self._recipe = Recipe(
            kind=KIND,
            columns=(),
            convert=lambda conversation: conversation,
            renderer=preprocessor.renderer,
            tokenize=BlockTokenizer(preprocessor.tokenizer),
            targets=replace(preprocessor.targets, max_length=UNBOUNDED),
        )

    def __call__(self, conversations: Sequence[Conversation], where: str) -> list[tuple[int, ...]]:
        """One tuple of ids per conversation. where: named in the DataError for one that can't be rendered."""
        made = dict(made_rows(list(enumerate(conversations)), self._recipe))
        found = []
        for number in range(len(conversations)):
            match made[number]:
                case BadRow(reason=reason, detail=detail):
                    raise DataError(f"{where}, question {number + 1}", f"{reason}: {detail}", "Choose another template.")
                case RefusedRow(problem=problem, fix=fix):
                    raise DataError(f"{where}, question {number + 1}", problem, fix)
                case (prompt_ids, _):
                    found.append(tuple(map(int, prompt_ids)))
        return found


def _answered(pair: tuple[Any, str | None], convert: Callable[[Any], Any]) -> Conversation:
    """pair: a raw row, and the text that its conversation is to end with; None: its own."""
    row, text = pair
    if isinstance(row, BadRow):
        raise row
    record = convert(row)
    conversation: Conversation = record if isinstance(record, Conversation) else _conversation_of(record)
    messages = conversation.messages
    has_answer = messages[-1].role == "assistant"
    if text is None:
        if not has_answer:
            raise BadRow("the row has no answer")
        return conversation
    return replace(conversation, messages=(*(messages[:-1] if has_answer else messages), Message("assistant", text)))


def _conversation_of(record: Any) -> Conversation:
    match record:
        case Labeled(conversation=conversation) | Pair(prompt=conversation):
            return conversation
    raise BadRow("the row is plain text, no conversation")


def _whole(made: Any) -> tuple[int, ...]:
    prompt_ids, answer_ids = made
    return (*map(int, prompt_ids), *map(int, answer_ids))


def _asked(block: list[Any], chunk: Chunk, recipe: Recipe, before: int) -> Iterator[PromptRow]:
    made = dict(made_rows([(place, row) for place, (_, row) in enumerate(block)], recipe))
    for place, (in_file, columns) in enumerate(block):
        where = sources.where(chunk, in_file)
        row = PromptRow(before + place + 1, where, {} if isinstance(columns, BadRow) else columns)
        match made[place]:
            case BadRow(reason=reason, detail=detail):
                yield replace(row, bad=f"{reason}: {detail}" if detail else reason)
            case RefusedRow(problem=problem, fix=fix):
                raise DataError(where, problem, fix)
            case (prompt_ids, answer_ids):
                yield replace(row, prompt_ids=tuple(map(int, prompt_ids)), answer_ids=tuple(map(int, answer_ids)))
