"""Ids of a text from the ids of its words, each encoded once.

A byte-level BPE tokenizer cuts a text at its added tokens, cuts the rest into words by a regular expression, and encodes each
word on its own. The cutting takes the Rust library most of its time (it keeps count of every character's origin), and the
words of a data set are few: cutting with Python's `re` and looking words up takes a third of the time. Both cut alike
where it is plain which characters are letters, digits and white space. So this is for ASCII, European letters, and symbols;
other text goes to Rust whole.
"""

from __future__ import annotations

import json
import re
from typing import Any
from unicodedata import is_normalized

import numpy as np
from tokenizers import Tokenizer

MAX_WORDS = 200_000
"""Words that are remembered, some 40 MB; then it starts anew."""
_LETTERS = (
    "a-zA-Z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0180-\u024f"  # without the long s, which (?i:s) matches
    "\u0391-\u03a1\u03a3-\u03ce\u0400-\u0481\u048a-\u052f"
)
_SYMBOLS = (
    "\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u0300-\u036f"
    "\u200b-\u200d\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2122\u2190-\u22ff\u2500-\u26ff\ufe0f"
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5"
)
"""Neither letters nor digits nor white space."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A digit is a word by itself, and cuts the text before the rest is looked at: to white space it is like the end.
_GPT2_SINGLE_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class WordIds(dict[str, bytes]):
    """The ids of each word met so far, as the bytes of an int32 array; a new one is encoded when it is looked up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encode = tokenizer.encode

    def __missing__(self, word: str) -> bytes:
        if len(self) >= MAX_WORDS:
            self.clear()
        self[word] = ids = np.array(self.encode(word, add_special_tokens=False).ids, np.int32).tobytes()
        return ids


class WordTokenizer:
    """Ids of a text, equal to the Rust tokenizer's, where it `takes` the text. Made by `word_tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, word: re.Pattern[str], added_tokens: list[str]) -> None:
        self._tokenizer, self._word = tokenizer, word
        longest_first = sorted(added_tokens, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._ids = WordIds(tokenizer)
        self._known = re.compile(f"[\\x00-\\x7f{_LETTERS}{_SYMBOLS}]*")

    def takes(self, text: str) -> bool:
        """NFC, the one normalizer that leaves ASCII alone, must have nothing to do."""
        return text.isascii() or (self._known.fullmatch(text) is not None and is_normalized("NFC", text))

    def __reduce__(self) -> Any:
        return word_tokenizer, (self._tokenizer,)

    def __call__(self, text: str) -> np.ndarray:
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                words.append(part)
            else:
                words += self._word.findall(part)
        return np.frombuffer(b"".join(map(self._ids.__getitem__, words)), np.int32)


def word_tokenizer(tokenizer: Tokenizer) -> WordTokenizer | None:
    """None where the tokenizer is not of the kind that works word by word."""
    spec = json.loads(tokenizer.to_str())
    pattern = _word_pattern(spec["pre_tokenizer"] or {})
    flags = ("lstrip", "rstrip", "single_word", "normalized")  # with none of them, a token is found by its text alone
    has_flags = any(token[flag] for token in spec["added_tokens"] for flag in flags)
    changes_ascii = spec["normalizer"] is not None and spec["normalizer"]["type"] != "NFC"
    is_bpe = spec["model"]["type"] == "BPE" and not spec["model"]["dropout"]
    if pattern is None or has_flags or changes_ascii or not is_bpe:
        return None
    return WordTokenizer(tokenizer, pattern, [token["content"] for token in spec["added_tokens"]])


def _word_pattern(pre_tokenizer: dict[str, Any]) -> re.Pattern[str] | None:
    """How these pre-tokenizers cut known text, as one expression that matches every word in turn."""
    match pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            pattern = _GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            pattern = _GPT2_SINGLE_DIGITS
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pass
        case _:
            return None
    return _for_known(pattern)


def _for_known(pattern: str) -> re.Pattern[str] | None:
    in_class = re.compile(r"\[[^\]]*\]")
    pattern = in_class.sub(lambda found: found[0].replace(r"\p{L}", _LETTERS).replace(r"\p{N}", "0-9"), pattern)
    pattern = pattern.replace(r"\p{L}", f"[{_LETTERS}]").replace(r"\p{N}", "[0-9]")
    try:
        # What no alternative matches is a word too; and no group, for findall to give whole matches. White space and (?i:) are
        # those of ASCII, as no other occurs.
        compiled = re.compile(rf"{pattern}|(?s:.)", re.ASCII)
    except re.error:
        return None
    return compiled if compiled.groups == 0 and r"\p" not in pattern else None
