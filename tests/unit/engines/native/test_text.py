from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raytune_llm.engines.native.text import TextStream


class Bytes:
    """A vocabulary of single bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def streamed(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(Bytes(), stop)
    pieces = [stream.push(byte) for byte in text.encode()]
    return [*pieces, stream.finish()], stream


@given(st.text())
def test_pieces_make_the_text_and_hold_whole_characters(text: str):
    pieces, stream = streamed(text)
    assert "".join(pieces) == stream.text == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_the_first_stop_string_is_told(text: str, stop: list[str]):
    pieces, stream = streamed(text, *stop)
    # A stop string ends the answer as soon as it is complete.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    whole = text if not ends else text[: min(ends)]
    expected = min([whole.find(one) for one in stop if one in whole], default=len(whole))
    assert "".join(pieces) == text[:expected]
    assert (stream.stopped is not None) == bool(ends)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    stream = TextStream(Bytes(), ["END"])
    assert [stream.push(byte) for byte in b"an EN"] == ["a", "n", " ", "", ""]
    assert stream.push(ord("T")) == "ENT"


def test_bytes_that_never_become_a_character_are_told_in_the_end():
    stream = TextStream(Bytes())
    assert stream.push(0xF0) + stream.finish() == "\ufffd"


@pytest.mark.parametrize("character", ["é", "語", "🙂"])
def test_a_character_is_told_with_its_last_byte(character: str):
    pieces, _ = streamed(character)
    assert pieces[:-2] == [""] * (len(character.encode()) - 1)
    assert pieces[-2] == character


def test_stop_strings_in_the_first_tokens_that_an_answer_must_have_do_not_end_it():
    stream = TextStream(Bytes(), ["ab"], min_tokens=3)
    assert [stream.push(byte) for byte in b"abababc"][:4] == ["a", "b", "a", "b"]  # its second "ab" begins in them
    assert stream.stopped == "ab" and stream.text == "abab"


def test_an_answer_that_goes_on_with_a_text_keeps_the_space_that_it_begins_with():
    words = ["<unk>", "▁The", "▁fox", "▁ran"]
    backend = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    goes_on, begins = TextStream(tokenizer, after=[1]), TextStream(tokenizer)
    assert [goes_on.push(2), goes_on.push(3), goes_on.text] == [" fox", " ran", " fox ran"]
    assert [begins.push(2), begins.push(3)] == ["fox", " ran"]
