"""Multiple-choice questions as conversations, word for word as LLaMA-Factory's evaluation asks them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from raytune_llm.evaluate.choice_files import ChoiceQuestion, Subject
from raytune_llm.records import Conversation, Message

BEFORE = {
    "en": "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "zh": "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
}
"""Language -> the beginning of the first user turn."""
AFTER = {"en": "\nAnswer:", "zh": "\n答案："}


def examples_of(subject: Subject, number: int, seed: int) -> list[ChoiceQuestion]:
    """The examples, which are the same for all questions of a subject, so that an engine computes them once. LLaMA-Factory draws
    new ones for each question, without a seed."""
    return random.Random(f"{seed} {subject.key}").sample(list(subject.examples), min(number, len(subject.examples)))


def asked(question: ChoiceQuestion, examples: Sequence[ChoiceQuestion], subject: str, lang: str) -> Conversation:
    """The conversation before the answer."""
    messages = []
    for example in examples:
        messages += [Message("user", _text(example, lang)), Message("assistant", example.answer)]
    messages.append(Message("user", _text(question, lang)))
    first = Message("user", BEFORE[lang].format(subject=subject) + messages[0].content)
    return Conversation((first, *messages[1:]))


def _text(question: ChoiceQuestion, lang: str) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in question.choices.items())
    return question.question + choices + AFTER[lang]
