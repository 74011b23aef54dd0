"""Tokenizes rendered texts in blocks: word by word if that is faster, else in one call to the Rust tokenizer.

The ids equal those of `apply_chat_template`: the template writes the special tokens, and none is added. If a text was cut into
pieces, each piece is encoded by itself; a piece that only looks like a control token is encoded character by character.

The tokenizer can return the character offsets of tokens, but this makes it slower. So the tokens of an answer are found
from special tokens instead, which no other token crosses: an answer ends with one, and begins a short header (such as `assistant`
and a newline) after one. Each row is checked for this; rows where it does not hold are encoded with offsets. In a text of pieces,
answers are pieces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from raytune_llm.data.templates.rendered import Rendered
from raytune_llm.data.tokens.words import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_HEADER_CHARS = 64
"""Longer text between a special token and an answer is not a header, but part of the prompt, which rarely repeats."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a rendered text."""

    ids: np.ndarray
    """int32."""
    answers: np.ndarray
    """int32: tokens [start, end) of each answer, flattened, in the order of Rendered.answers."""


class BlockTokenizer:
    """Tokenizes blocks of texts. It can be pickled: the Rust tokenizer is stored as its JSON."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._rust: Tokenizer = tokenizer.backend_tokenizer
        self._by_words = word_tokenizer(self._rust)
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._is_special = np.zeros(max(len(tokenizer), max(special, default=0) + 1), bool)
        self._is_special[list(special)] = True
        self._headers: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rust_letters"}

    @cached_property
    def _rust_letters(self) -> Tokenizer:
        """A copy of the tokenizer that encodes the text of special tokens like any other text."""
        tokenizer = Tokenizer.from_str(self._rust.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def __call__(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """The tokens of each text in order."""
        pieces: list[str] = []
        edges = [_edges(one) for one in rendered]
        for one, row in zip(rendered, edges, strict=True):
            pieces += [one.text[start:end] for start, end in pairwise(row)]
        ids, starts = self.encode(pieces)

        tokens: list[Any] = []
        at = 0
        for one, row in zip(rendered, edges, strict=True):
            mine = starts[at : at + len(row)]
            at += len(row) - 1
            if one.plain:
                tokens.append(self._with_letters(one, row, [ids[start:end] for start, end in pairwise(mine)]))
            elif one.cuts:
                tokens.append(_from_pieces(one, row, ids[mine[0] : mine[-1]], mine - mine[0]))
            else:
                tokens.append(self._from_special_tokens(one, ids[mine[0] : mine[1]]))
        unclear = [number for number, found in enumerate(tokens) if found is None]
        encodings = self._rust.encode_batch([rendered[number].text for number in unclear], add_special_tokens=False)
        for number, encoding in zip(unclear, encodings, strict=True):
            spans = spans_from_offsets(encoding, rendered[number].answers)
            tokens[number] = Tokens(np.array(encoding.ids, dtype=np.int32), spans)
        return tokens

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, concatenated (special tokens are recognized), and the index of each text's first id, followed by
        the number of ids."""
        if self._by_words is not None:
            return self._by_words(texts)
        rows = [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]
        starts = np.cumsum([0, *map(len, rows)])
        return np.fromiter(chain.from_iterable(rows), np.int32, starts[-1]), starts

    def ends(self, text: str) -> list[int]:
        """The index of the character after each token of a text without control tokens."""
        return [end for _, end in self._rust.encode(text, add_special_tokens=False).offsets]

    def _with_letters(self, one: Rendered, edges: list[int], ids: list[np.ndarray]) -> Tokens:
        """The tokens of a text in which some pieces only look like control tokens; these are encoded character by character."""
        letters = {start for start, _ in one.plain}
        for number, start in enumerate(edges[:-1]):
            if start in letters:
                text = one.text[start : edges[number + 1]]
                ids[number] = np.array(self._rust_letters.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        return _from_pieces(one, edges, np.concatenate(ids), np.cumsum([0, *map(len, ids)]))

    def _from_special_tokens(self, one: Rendered, ids: np.ndarray) -> Tokens | None:
        answers = self._spans_from_special_tokens(one, ids)
        return None if answers is None else Tokens(ids, answers)

    def _spans_from_special_tokens(self, one: Rendered, ids: np.ndarray) -> np.ndarray | None:
        """Flattened token spans of the answers; None if special tokens don't determine them."""
        ends = [match.end() for match in self._special_text.finditer(one.text)]
        at = np.flatnonzero(self._is_special[ids]).tolist()
        if len(ends) != len(at):
            return None
        tokens = []
        for start, end in one.answers:
            before, last = bisect_right(ends, start) - 1, bisect_right(ends, end) - 1
            if before < 0 or ends[last] != end or start - ends[before] > MAX_HEADER_CHARS:
                return None
            header = self._header_ids(one.text[ends[before] : start])
            first = at[before] + 1 + len(header)
            if not np.array_equal(ids[at[before] + 1 : first], header):
                return None  # a token straddles the end of the header
            tokens += (first, at[last] + 1)
        return np.array(tokens, dtype=np.int32)

    def _header_ids(self, header: str) -> np.ndarray:
        if header not in self._headers:
            self._headers[header] = np.array(self._rust.encode(header, add_special_tokens=False).ids, dtype=np.int32)
        return self._headers[header]


def _from_pieces(one: Rendered, edges: list[int], ids: np.ndarray, starts: np.ndarray) -> Tokens:
    """The tokens of a text in pieces. starts: the index of each piece's first id, then the number of ids."""
    at = dict(zip(edges, starts.tolist(), strict=True))
    return Tokens(ids, np.array([at[position] for answer in one.answers for position in answer], dtype=np.int32))


def spans_from_offsets(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Flattened token spans for spans of characters. A token that straddles the start of a span belongs to it."""
    tokens = []
    for start, end in spans:
        first = next((token for char in range(start, end) if (token := encoding.char_to_token(char)) is not None), 0)
        backwards = range(end - 1, start - 1, -1)
        last = next((token for char in backwards if (token := encoding.char_to_token(char)) is not None), None)
        tokens += (first, first if last is None else last + 1)
    return np.array(tokens, dtype=np.int32)


def _edges(one: Rendered) -> list[int]:
    """The character indices at which the text is cut into pieces, from 0 to its length."""
    edges = {0, len(one.text)}
    if one.cuts or one.plain:
        edges.update(one.cuts, *one.plain, *one.answers)
    return sorted(edges)
