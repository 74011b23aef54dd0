"""Prompts with one or two answers: how a rendered text is split into them, truncated and refused."""

from __future__ import annotations

import numpy as np

from raytune_llm.data.dropped import BadRow, RefusedRow, TooLong
from raytune_llm.data.kinds.kind import Document, Targets
from raytune_llm.data.templates.rendered import Rendered
from raytune_llm.data.tokens.tokenize import Tokens
from raytune_llm.data.tokens.truncation import shares
from raytune_llm.records import Conversation, Message

NOTHING_LEFT = "no trained token is left after truncation to data.max_length"


def prompt_and_answer(text: Rendered, tokens: Tokens, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompt and of the last answer. A stop token that the template does not write is appended to the answer."""
    start, end = tokens.answers[-2:].tolist()
    answer = tokens.ids[start:end]
    if text.ends_early or targets.end_of_row is None:
        return tokens.ids[:start], answer
    return tokens.ids[:start], np.append(answer, np.int32(targets.end_of_row))


def shortened(text: Rendered, tokens: Tokens, targets: Targets, *, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same, with at most max_length tokens in all. Raises TooLong if there are more, unless `cut`."""
    prompt, answer = prompt_and_answer(text, tokens, targets)
    check_length(len(prompt) + len(answer), targets, cut=cut)
    source, target = shares(len(prompt), len(answer), targets.max_length)
    return prompt[:source], answer[:target]


def answered(prompt: np.ndarray, answer: np.ndarray) -> Document:
    """A document of prompt and answer, in which the answer is trained."""
    return Document(np.concatenate([prompt, answer]), np.array([len(prompt), len(prompt) + len(answer)], np.int32))


def check_answer(answer: Message) -> None:
    """Refuse an empty answer. Only its end token would be compared, which trains the model to say nothing, or never to."""
    if not (answer.content.strip() or answer.tool_calls or answer.reasoning):
        raise BadRow("an answer is empty")


def check_media(conversation: Conversation) -> None:
    media = conversation.media
    for column, values in (("images", media.images), ("videos", media.videos), ("audios", media.audios)):
        if values:
            raise RefusedRow(
                f"the row has {column}, which are not read yet",
                f"Set data.format.{column}=null to use its text alone.",
            )


def check_length(length: int, targets: Targets, *, cut: bool) -> None:
    """Raises TooLong if the row is too long, unless `cut`."""
    if length > targets.max_length and not cut:
        raise TooLong(length)
