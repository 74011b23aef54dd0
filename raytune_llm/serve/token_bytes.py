"""The bytes of single tokens, which need not be whole characters."""

from __future__ import annotations

import codecs
import json
from functools import lru_cache
from typing import Any

from raytune_llm.data.tokens.tokenizer import byte_characters

MAX_CACHED = 65_536
SPACE = "\u2581"
"""How SentencePiece writes a space."""


class TokenBytes:
    """The bytes of a tokenizer's tokens, by the kind of its vocabulary: bytes as characters, as in GPT-2; or text, in which
    bytes that are no character are tokens <0x00> to <0xFF>, as in SentencePiece."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        characters = byte_characters() if "ByteLevel" in kinds else ()
        self._of_characters = {character: byte for byte, character in enumerate(characters)}
        self._falls_back = "ByteFallback" in kinds
        self.strips = not kinds.isdisjoint(("Strip", "Metaspace"))
        """A text loses the space that its first token begins with."""
        self.special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.of = lru_cache(MAX_CACHED)(self._of)

    def text(self, token: int) -> str:
        """The token's text. Bytes that are no text are written as in OpenAI's API: `bytes:\\xe2\\x80`."""
        held = self.of(token)
        try:
            return held.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)

    def _of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model has more embeddings than the tokenizer has tokens
            return b""
        if self._of_characters and all(character in self._of_characters for character in piece):
            return bytes(self._of_characters[character] for character in piece)
        if self._falls_back:
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
        return self._tokenizer.decode([token]).encode()


class TextOffsets:
    """The places of tokens in the text that they make, in characters. Special tokens are no part of it."""

    def __init__(self, tokens: TokenBytes, *, goes_on: bool = False) -> None:
        """goes_on: the text continues another one, so a space at its beginning is kept."""
        self._tokens, self._end, self._strips = tokens, 0, tokens.strips and not goes_on
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, token: int, *, is_shown: bool = False) -> int:
        """The place of the next token. is_shown: the token is part of the text even if it is special."""
        place = self._end
        held = b"" if token in self._tokens.special and not is_shown else self._tokens.of(token)
        if place == 0 and self._strips:
            held = held.removeprefix(b" ")
        self._end += len(self._decoder.decode(held))
        return place


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of those that it consists of."""
    return {decoder["type"], *(kind for one in decoder.get("decoders", ()) for kind in _kinds(one))}
