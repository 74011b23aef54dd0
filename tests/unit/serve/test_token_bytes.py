from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.serve.token_bytes import TextOffsets, TokenBytes

TEXT = "Grüße, 世界 🙂!"


def sentencepiece() -> Any:
    """A vocabulary of some words, and of bytes for all else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Gr", "ü", "ße", ",", "▁", "世", "!"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def test_bytes_of_byte_level_tokens_make_the_text():
    tokens = TokenBytes(byte_tokenizer())
    assert b"".join(tokens.of(id) for id in byte_tokenizer()(TEXT).input_ids) == TEXT.encode()


def test_bytes_of_sentencepiece_s_tokens_make_the_text():
    tokenizer = sentencepiece()
    smile = [f"<0x{byte:02X}>" for byte in "🙂".encode()]
    ids = ids_of(tokenizer, "▁Gr", "ü", "ße", ",", "▁", "世", *smile, "!")
    assert b"".join(TokenBytes(tokenizer).of(id) for id in ids) == " Grüße, 世🙂!".encode()
    offsets = TextOffsets(TokenBytes(tokenizer))
    text = tokenizer.decode(ids)
    places = [offsets.place(id) for id in ids]
    assert text == "Grüße, 世🙂!" and places == [0, 2, 3, 5, 6, 7, *[8] * 4, 9]


@pytest.mark.parametrize(("held", "written"), [(0x41, "A"), (0xC3, "bytes:\\xc3"), (256, "<|im_start|>"), (10_000, "")])
def test_what_is_no_text_is_written_as_its_bytes(held: int, written: str):
    assert TokenBytes(byte_tokenizer()).text(held) == written


def test_special_tokens_have_no_place_in_the_text():
    tokenizer = byte_tokenizer()
    offsets = TextOffsets(TokenBytes(tokenizer))
    assert [offsets.place(id) for id in tokenizer("<|im_start|>é!", add_special_tokens=False).input_ids] == [0, 0, 0, 1]
