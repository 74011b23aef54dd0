from __future__ import annotations

import numpy as np
import pytest

from raytune_llm.data.prompts import PROMPTS, TEXT_PROMPT_TOKENS
from raytune_llm.data.store import LISTS

TEN = np.arange(10)


def parts(kind, *lists):
    return tuple(part.tolist() for part in PROMPTS[kind](*lists))


def test_there_is_a_request_for_every_kind_of_row():
    assert PROMPTS.keys() == LISTS.keys()


def test_a_conversation_asks_for_its_last_answer():
    assert parts("conversations", TEN, np.array([2, 4, 6, 9])) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])


def test_a_pair_asks_for_the_chosen_answer():
    assert parts("pairs", TEN[:2], TEN[2:4], TEN[4:]) == ([0, 1], [2, 3])


@pytest.mark.parametrize("kind", ["text", "conversations"])
@pytest.mark.parametrize(("length", "asked"), [(200, TEXT_PROMPT_TOKENS), (9, 5), (1, 1)])
def test_a_text_and_what_is_trained_whole_ask_to_be_gone_on_with(kind, length, asked):
    request, rest = parts(kind, np.arange(length), np.array([0, length]))
    assert (len(request), request + rest) == (asked, list(range(length)))
