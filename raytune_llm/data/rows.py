"""Records -> rows of the token store: what is rendered for each kind of row, and what becomes of its tokens.

To add a kind: its two functions and the entry in KINDS, its row in records.py and its columns in data/store.py, and how it is
batched in data/batches.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.formats import last_answer_only
from raytune_llm.data.templates.render import PlainText, Rendered, Renderer
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.data.tokens.truncation import shares, shorten
from raytune_llm.records import Conversation, Labeled, LabeledRow, Message, Pair, PairRow, PromptRow, Record, Text, TokenRow

StoreRow = TokenRow | PairRow | LabeledRow | PromptRow
NOTHING_LEFT = "no trained token is left after truncation to data.max_length"


@dataclass(frozen=True)
class Targets:
    """How rows are shortened and what of them is trained."""

    max_length: int
    overlong: str
    mask_history: bool = False
    train_on_prompt: bool = False
    preserve_thinking: bool = False
    end_of_row: int | None = None
    """The id after a row's last answer, trained at the end of each, where the template writes no end of its own."""
    text_start: int | None = None
    text_end: int | None = None
    """What stands before and after each plain text."""
    texts_whole: bool = False
    """Plain texts may be of any length: they are packed end to end."""


@dataclass(frozen=True)
class Kind:
    render: Callable[[Record, Any, Targets], tuple[Rendered, ...]]
    """The texts that a row is made from. Raises BadRow or RefusedRow."""
    row: Callable[[Record, tuple[Rendered, ...], list[Tokens], Targets], StoreRow]
    """The row. Raises BadRow where nothing is left to train, RefusedRow where it is too long and may not be."""


WHAT = {
    Pair: "a pair of answers, as stage=dpo, orpo, simpo, cpo or reward learns from",
    Labeled: "an answer with a verdict, as stage=kto learns from",
    Text: "plain text, as stage=pretrain learns from",
}
"""Of a row that is no conversation."""

# Conversations: every trained answer --------------------------------------------------------------------------------------


def _render_conversation(record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
    if not isinstance(record, Conversation):
        raise BadRow("the row is no plain conversation", f"it is {WHAT[type(record)]}")
    conversation = last_answer_only(record) if targets.mask_history else record
    if not any(message.role == "assistant" for message in conversation.messages):
        raise BadRow("there is no answer to learn")
    if not any(message.trained for message in conversation.messages):
        raise BadRow("no answer is trained")
    _without_media(conversation)
    return (renderer.render(conversation, earlier_answers=not targets.mask_history or targets.preserve_thinking),)


def _conversation_row(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], targets: Targets) -> TokenRow:
    (text,), (whole,) = rendered, tokens
    room = targets.max_length - (targets.end_of_row is not None)
    kept = whole
    if len(whole.ids) > room:
        OVERLONG[targets.overlong](len(whole.ids), targets.max_length)
        kept = shorten(whole, room, last_first=targets.mask_history)
    if targets.end_of_row is not None:
        return _ended(kept, text.weights, targets.end_of_row)
    if targets.train_on_prompt:
        return _trained(kept.ids, np.array([(0, len(kept.ids))]), (1.0,))
    return _trained(kept.ids, kept.answers.reshape(-1, 2), text.weights)


def _ended(tokens: Tokens, weights: tuple[float, ...], end: int) -> TokenRow:
    """With the end token after the last answer. At the end of every span it is the target, whatever follows in the text.

    A turn whose request is cut away altogether has no place for the end of the turn before it: it goes, with those after it.
    """
    answers = tokens.answers.reshape(-1, 2)
    touching = np.flatnonzero((answers[1:, 0] == answers[:-1, 1]) & (answers[1:, 1] > answers[1:, 0]))
    if len(touching):
        answers = answers[: touching[0] + 1]
    ids = np.append(tokens.ids[: answers[-1, 1]], np.int32(end))
    ended = answers[:, 1] > answers[:, 0]
    ended[-1] = True  # also where all of it is cut away, but not its end
    return _trained(ids, np.stack([answers[:, 0], answers[:, 1] + ended], axis=1), weights[: len(answers)])


def _trained(ids: np.ndarray, answers: np.ndarray, weights: tuple[float, ...]) -> TokenRow:
    """With the answers that weigh something and hold a target. The very first token is none: nothing predicts it."""
    # By hand: numpy takes its time over three or four answers.
    turns = zip(answers.tolist(), weights, strict=True)
    targets = [(start, end, weight) for (start, end), weight in turns if weight > 0 and end > max(start, 1)]
    if not targets:
        raise BadRow(NOTHING_LEFT)
    spans = np.array([edge for start, end, _ in targets for edge in (start, end)], np.int32)
    if all(weight == 1 for *_, weight in targets):
        return TokenRow(ids, spans)
    return TokenRow(ids, spans, np.array([weight for *_, weight in targets], np.float32))


# Pairs ----------------------------------------------------------------------------------------------------------------


def _render_pair(record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
    if not isinstance(record, Pair):
        raise BadRow("the row is no pair of answers", "set data.format.chosen and data.format.rejected to its columns")
    _without_media(record.prompt)
    if record.chosen == record.rejected:
        raise BadRow("both answers are the same")
    for answer in (record.chosen, record.rejected):
        _not_empty(answer[-1])
    messages = record.prompt.messages
    sides = (replace(record.prompt, messages=(*messages, *answer)) for answer in (record.chosen, record.rejected))
    # Cut before the answers, so that the request has the same tokens on both sides.
    return tuple(replace(side, cuts=(*side.cuts, side.answers[-1][0])) for side in renderer.pair(*sides))


def _pair_row(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], targets: Targets) -> PairRow:
    (prompt, chosen), (_, rejected) = (_prompt_and_answer(side, targets) for side in tokens)
    most = max(len(chosen), len(rejected))
    if len(prompt) + most > targets.max_length:
        OVERLONG[targets.overlong](len(prompt) + most, targets.max_length)
    source, target = shares(len(prompt), most, targets.max_length)
    assert isinstance(record, Pair)
    row = PairRow(prompt[:source], chosen[:target], rejected[:target], record.margin)
    if not min(len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)):
        raise BadRow(NOTHING_LEFT)
    return row


def _prompt_and_answer(tokens: Tokens, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    start, end = tokens.answers[-2:].tolist()
    answer = tokens.ids[start:end]
    return tokens.ids[:start], answer if targets.end_of_row is None else np.append(answer, np.int32(targets.end_of_row))


# Labelled answers, and prompts --------------------------------------------------------------------------------------------


def _render_labeled(record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
    if not isinstance(record, Labeled):
        raise BadRow("the row has no verdict", "set data.format.label to a column that is true or false")
    _without_media(record.conversation)
    if record.conversation.messages[-1].role != "assistant":
        raise BadRow("there is no answer to judge")
    _not_empty(record.conversation.messages[-1])
    return (renderer.render(record.conversation, earlier_answers=False),)


def _labeled_row(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], targets: Targets) -> LabeledRow:
    assert isinstance(record, Labeled)
    prompt, answer = _shared(tokens[0], targets)
    if not min(len(prompt), len(answer)):
        raise BadRow(NOTHING_LEFT)
    return LabeledRow(prompt, answer, record.desirable)


def _render_prompt(record: Record, renderer: Renderer, targets: Targets) -> tuple[Rendered, ...]:
    match record:
        case Labeled(conversation=conversation) | Pair(prompt=conversation) | (Conversation() as conversation):
            _without_media(conversation)
        case Text():
            raise BadRow("the row is plain text, no conversation")
    messages = conversation.messages
    if messages[-1].role != "assistant":
        messages = (*messages, Message("assistant", ""))
    return (renderer.render(replace(conversation, messages=messages), earlier_answers=False),)


def _prompt_row(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], targets: Targets) -> PromptRow:
    prompt, answer = _shared(tokens[0], targets)
    if not len(prompt):
        raise BadRow("the prompt is empty")
    return PromptRow(prompt, answer)


def _shared(tokens: Tokens, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    prompt, answer = _prompt_and_answer(tokens, targets)
    if len(prompt) + len(answer) > targets.max_length:
        OVERLONG[targets.overlong](len(prompt) + len(answer), targets.max_length)
    source, target = shares(len(prompt), len(answer), targets.max_length)
    return prompt[:source], answer[:target]


# Plain text -----------------------------------------------------------------------------------------------------------


def _render_text(record: Record, renderer: Renderer | PlainText, targets: Targets) -> tuple[Rendered, ...]:
    match record:
        case Text(text=text):
            pass
        case Conversation(messages=messages) | Labeled(conversation=Conversation(messages=messages)):
            text = next((message.content for message in messages if message.role != "system"), "")
        case Pair():
            raise BadRow("the row is a pair of answers, not plain text")
    if not text:
        raise BadRow("the text is empty")
    return (Rendered(text, (), (), plain=tuple(found.span() for found in renderer.control.finditer(text))),)


def _text_row(record: Record, rendered: tuple[Rendered, ...], tokens: list[Tokens], targets: Targets) -> TokenRow:
    start = [] if targets.text_start is None else [targets.text_start]
    end = [] if targets.text_end is None else [targets.text_end]
    ids = np.concatenate([start, tokens[0].ids, end]).astype(np.int32)
    if len(ids) > targets.max_length and not targets.texts_whole:
        OVERLONG[targets.overlong](len(ids), targets.max_length)
        ids = ids[: targets.max_length]
    return _trained(ids, np.array([(0, len(ids))]), (1.0,))


KINDS = {
    "conversations": Kind(_render_conversation, _conversation_row),
    "pairs": Kind(_render_pair, _pair_row),
    "labeled": Kind(_render_labeled, _labeled_row),
    "prompts": Kind(_render_prompt, _prompt_row),
    "text": Kind(_render_text, _text_row),
}


# What all have --------------------------------------------------------------------------------------------------------


def _not_empty(answer: Message) -> None:
    """An answer of its end alone would be judged: to say nothing is better, or worse, than to answer."""
    if not (answer.content.strip() or answer.tool_calls or answer.reasoning):
        raise BadRow("an answer is empty")


def _without_media(conversation: Conversation) -> None:
    media = conversation.media
    for column, values in (("images", media.images), ("videos", media.videos), ("audios", media.audios)):
        if values:
            raise RefusedRow(
                f"the row has {column}, which are not trained on yet",
                f"Set data.format.{column}=null to train on its text alone.",
            )


def _truncate(length: int, max_length: int) -> None:
    pass


def _drop(length: int, max_length: int) -> None:
    raise BadRow("the row is longer than data.max_length", f"{length} tokens")


def _refuse(length: int, max_length: int) -> None:
    raise RefusedRow(
        f"the row has {length} tokens, data.max_length is {max_length}",
        "Raise data.max_length, or set data.overlong to truncate or drop.",
    )


OVERLONG: dict[str, Callable[[int, int], None]] = {"truncate": _truncate, "drop": _drop, "error": _refuse}
"""What is done about a row that is too long before it is shortened."""
