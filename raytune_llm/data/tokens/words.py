"""Tokenizes texts from the ids of their words, each of which is encoded only once.

A byte-level BPE tokenizer cuts a text at its added tokens, cuts the rest into words with a regular expression, and encodes each
word by itself. The Rust library spends most of its time on the cutting, because it tracks the origin of every character, and a
data set has few different words. So numpy cuts all texts of a block together, at added tokens and at the spaces before which a
word always ends; Arrow finds equal chunks; and only new chunks are processed one by one. Python's `re` cuts these into words, and
new words are encoded by Rust. `re` gives the same words if the classes of all characters are certain: ASCII, European letters
and symbols. A chunk with other characters is encoded by Rust as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from unicodedata import is_normalized

import numpy as np
from tokenizers import Tokenizer

MAX_WORDS = 200_000
"""Words (and chunks) that the cache holds, about 40 MB, before it is emptied."""
MAX_REMEMBERED = 64
"""Maximum bytes of a cached chunk and characters of a cached word. Longer ones rarely repeat."""
_LETTERS = (
    "a-zA-Z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0180-\u024f"  # without the long s, which (?i:s) matches
    "\u0391-\u03a1\u03a3-\u03ce\u0400-\u0481\u048a-\u052f"
)
_SYMBOLS = (
    "\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u0300-\u036f"
    "\u200b-\u200d\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2122\u2190-\u22ff\u2500-\u26ff\ufe0f"
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5"
)
"""Characters that are certainly neither letters nor digits nor white space."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit is a word, and it splits the text first, so white space before it behaves as at the end of a text.
_GPT2_SINGLE_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE_STARTS_A_WORD = (_GPT2, _GPT2_SINGLE_DIGITS, _LLAMA3, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"))
"""In these patterns (the last is Qwen 2's), a space belongs to the word after it or to a run of white space. So before a single
space a word always ends, and the text before it does not affect the words after it."""
_BYTES = np.arange(256, dtype=np.uint8)
_SOLID = (_BYTES < 0x80) & ~np.isin(_BYTES, np.frombuffer(b" \t\n\v\f\r\x1c\x1d\x1e\x1f", np.uint8))
"""ASCII bytes that are not white space in any of these regular expressions."""
_LEADS_A_LETTER = (_BYTES >= 0xC3) & (_BYTES < 0xE0)
"""First bytes of the two-byte UTF-8 range U+00C0 to U+07FF, which has no white space."""


class WordTokenizer:
    """Gives the same ids as the Rust tokenizer. `word_tokenizer` creates it."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, word: re.Pattern[str], added_tokens: list[str]) -> None:
        self._tokenizer, self._word = tokenizer, word
        longest_first = sorted((token.encode() for token in added_tokens), key=len, reverse=True)
        self._added = re.compile(b"|".join(map(re.escape, longest_first)) or rb"(?!)")
        self._added_tokens = frozenset(longest_first)
        self._cuts_at_spaces = pattern in SPACE_STARTS_A_WORD
        self._known = re.compile(f"[\\x00-\\x7f{_LETTERS}{_SYMBOLS}]*")
        self._chunks: dict[bytes, bytes] = {}
        """The ids of each chunk met so far, as the bytes of an int32 array."""
        self._words: dict[str, bytes] = {}

    def __reduce__(self) -> Any:
        return word_tokenizer, (self._tokenizer,)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, concatenated, and the index of each text's first id, followed by the number of ids."""
        import pyarrow as pa  # kinds of rows are imported before a command's early checks, which pyarrow would delay

        encoded = [text.encode() for text in texts]
        text_starts = np.cumsum([0, *map(len, encoded)])
        data = b"".join(encoded)
        starts = self._chunk_starts(data, text_starts)
        buffers = [None, pa.py_buffer(starts), pa.py_buffer(data)]
        chunks = pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers).dictionary_encode()
        ids, ends = self._ids_of(chunks.dictionary.to_pylist())
        which = chunks.indices.to_numpy()
        counts = np.diff(ends, prepend=0)[which]
        passed = np.concatenate([[0], np.cumsum(counts)])
        # Position i of the result is in the chunk that starts at passed[n]; its ids are those before ends[which[n]].
        result = ids[np.repeat(ends[which] - passed[1:], counts) + np.arange(passed[-1])]
        return result, passed[np.searchsorted(starts, text_starts)]

    def _chunk_starts(self, data: bytes, text_starts: np.ndarray) -> np.ndarray:
        """The byte offsets of chunk starts, followed by the number of bytes."""
        starts = np.zeros(len(data) + 1, bool)
        starts[text_starts] = True
        starts[[edge for found in self._added.finditer(data) for edge in found.span()]] = True
        if self._cuts_at_spaces:
            byte = np.frombuffer(data, np.uint8)
            spaces = np.flatnonzero(byte[1:-1] == ord(" ")) + 1
            before, after = byte[spaces - 1], byte[spaces + 1]
            ends_a_letter = (before >= 0x80) & _LEADS_A_LETTER[byte[spaces - 2]]
            clear = (_SOLID[before] | ends_a_letter) & (_SOLID[after] | _LEADS_A_LETTER[after])
            starts[spaces[clear]] = True
        return np.flatnonzero(starts)

    def _ids_of(self, chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of these chunks, concatenated, and the end index of each chunk's ids."""
        known = list(map(self._chunks.get, chunks))
        new = [chunk for chunk, ids in zip(chunks, known, strict=True) if ids is None]
        fresh = dict(zip(new, self._encode(new), strict=True))
        ids_of = [fresh[chunk] if ids is None else ids for chunk, ids in zip(chunks, known, strict=True)]
        if len(self._chunks) > MAX_WORDS:
            self._chunks.clear()
        self._chunks.update((chunk, ids) for chunk, ids in fresh.items() if len(chunk) <= MAX_REMEMBERED)
        ids = np.frombuffer(b"".join(ids_of), np.int32)
        return ids, np.cumsum(np.fromiter(map(len, ids_of), np.int64, len(ids_of))) // ids.itemsize

    def _encode(self, chunks: list[bytes]) -> list[bytes]:
        """The ids of each chunk, encoded word by word."""
        cut = [self._cut(chunk) for chunk in chunks]
        if len(self._words) > MAX_WORDS:
            self._words.clear()
        new = list({word for word in chain.from_iterable(cut) if word not in self._words})
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._words[word] = np.array(encoding.ids, np.int32).tobytes()
        ids = [b"".join(map(self._words.__getitem__, words)) for words in cut]
        for word in new:
            if len(word) > MAX_REMEMBERED:
                del self._words[word]
        return ids

    def _cut(self, chunk: bytes) -> Iterable[str]:
        """The words of a chunk, or the whole chunk if its words are not certain. An added token counts as a word."""
        text = chunk.decode()
        if chunk in self._added_tokens or not self._takes(text):
            return (text,)
        return self._word.findall(text)

    def _takes(self, text: str) -> bool:
        """Whether the normalizer (NFC or none) leaves the text unchanged."""
        return text.isascii() or (self._known.fullmatch(text) is not None and is_normalized("NFC", text))


def word_tokenizer(tokenizer: Tokenizer) -> WordTokenizer | None:
    """A WordTokenizer with the same results, or None if the tokenizer does not work word by word."""
    spec = json.loads(tokenizer.to_str())
    pattern = _word_pattern(spec["pre_tokenizer"] or {})
    word = None if pattern is None else _for_known(pattern)
    flags = ("lstrip", "rstrip", "single_word", "normalized")  # with none of them, a token is found by its text alone
    has_flags = any(token[flag] for token in spec["added_tokens"] for flag in flags)
    changes_ascii = spec["normalizer"] is not None and spec["normalizer"]["type"] != "NFC"
    is_bpe = spec["model"]["type"] == "BPE" and not spec["model"]["dropout"]
    if pattern is None or word is None or has_flags or changes_ascii or not is_bpe:
        return None
    return WordTokenizer(tokenizer, pattern, word, [token["content"] for token in spec["added_tokens"]])


def _word_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """One regular expression that matches the words that these pre-tokenizers cut; None if there is none."""
    match pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return _GPT2_SINGLE_DIGITS
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
        case _:
            return None


def _for_known(pattern: str) -> re.Pattern[str] | None:
    """The pattern in the syntax of Python's `re`, for texts of known characters; None if it can't be expressed."""
    in_class = re.compile(r"\[[^\]]*\]")
    pattern = in_class.sub(lambda found: found[0].replace(r"\p{L}", _LETTERS).replace(r"\p{N}", "0-9"), pattern)
    pattern = pattern.replace(r"\p{L}", f"[{_LETTERS}]").replace(r"\p{N}", "[0-9]")
    try:
        # The text between matches is a word too; and no group, for findall to give whole matches. White space and (?i:) are
        # those of ASCII, as no other occurs.
        compiled = re.compile(rf"{pattern}|(?s:(?!{pattern}).)+", re.ASCII)
    except re.error:
        return None
    return compiled if compiled.groups == 0 and r"\p" not in pattern else None
