"""Ids of a text from the ids of its words, each encoded once.

A byte-level BPE tokenizer cuts a text at its added tokens, cuts the rest into words by a regular expression, and encodes each
word on its own. The cutting takes the Rust library most of its time (it keeps count of every character's origin), and the
words of a data set are few: cutting with Python's `re` and looking words up takes a third of the time. Both cut alike
where `\\p{L}` and `\\p{N}` are plain letters and digits, so this is for ASCII text; other text goes to Rust whole.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MAX_WORDS = 200_000
"""Words that are remembered, some 40 MB; then it starts anew."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A digit is a word by itself, and cuts the text before the rest is looked at: to white space it is like the end.
_GPT2_SINGLE_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class WordIds(dict[str, list[int]]):
    """The ids of each word met so far; a new one is encoded when it is looked up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encode = tokenizer.encode

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= MAX_WORDS:
            self.clear()
        self[word] = ids = self.encode(word, add_special_tokens=False).ids
        return ids


class WordTokenizer:
    """Ids of ASCII texts, equal to the Rust tokenizer's. Made by `word_tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, word: re.Pattern[str], added_tokens: list[str]) -> None:
        self._tokenizer, self._word = tokenizer, word
        longest_first = sorted(added_tokens, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._ids = WordIds(tokenizer)

    def __reduce__(self) -> Any:
        return word_tokenizer, (self._tokenizer,)

    def __call__(self, text: str) -> np.ndarray:
        words: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                words.append(part)
            else:
                words += self._word.findall(part)
        return np.array(list(chain.from_iterable(map(self._ids.__getitem__, words))), dtype=np.int32)


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
    """How these pre-tokenizers cut ASCII text, as one expression that matches every word in turn."""
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
    return _for_ascii(pattern)


def _for_ascii(pattern: str) -> re.Pattern[str] | None:
    in_class = re.compile(r"\[[^\]]*\]")
    pattern = in_class.sub(lambda found: found[0].replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"), pattern)
    pattern = pattern.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    try:
        # What no alternative matches is a word too; and no group, for findall to give whole matches.
        compiled = re.compile(rf"{pattern}|(?s:.)", re.ASCII)
    except re.error:
        return None
    return compiled if compiled.groups == 0 and r"\p" not in pattern else None
