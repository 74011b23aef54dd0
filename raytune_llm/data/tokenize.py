"""Rendered texts -> token rows, a block at a time: word by word where that is faster, else in one call into Rust.

Ids are those of the whole text, and equal `apply_chat_template`'s: the template holds the special tokens, none is added.

Where a span of characters lies among the tokens can be asked of the tokenizer, but to keep count of characters takes it
half as long again. So spans are found from special tokens instead, which no other token crosses: a span ends with one, and
starts a short header (`assistant` and a newline, say) after one. Each row is checked for that, and the rows where it does
not hold are encoded with offsets.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates import Rendered
from raytune_llm.data.words import word_tokenizer
from raytune_llm.records import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_HEADER_CHARS = 64
"""Longer text between a special token and an answer is no header but part of the request, and seldom comes again."""
Result = TokenRow | BadRow | RefusedRow


class BlockTokenizer:
    """Token rows of a block of texts. Can be pickled: the Rust tokenizer travels as its JSON."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._rust: Tokenizer = tokenizer.backend_tokenizer
        self._by_words = word_tokenizer(self._rust)
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._is_special = np.zeros(max(len(tokenizer), max(special, default=0) + 1), bool)
        self._is_special[list(special)] = True
        self._headers: dict[str, np.ndarray] = {}

    def __call__(self, rendered: Sequence[Rendered], *, max_length: int, overlong: str) -> Iterator[Result]:
        """The token row of each text in order, or why there is none."""
        shorten = OVERLONG[overlong]
        for row in self._rows(rendered):
            try:
                yield row if len(row.ids) <= max_length else shorten(row, max_length)
            except (BadRow, RefusedRow) as bad:
                yield bad

    def _rows(self, rendered: Sequence[Rendered]) -> list[TokenRow]:
        texts = [one.text for one in rendered]
        ids: list[Any] = [None] * len(texts)
        if self._by_words is not None:
            ids = [self._by_words(text) if text.isascii() else None for text in texts]
        whole = [number for number, row in enumerate(ids) if row is None]
        for number, encoding in zip(
            whole, self._rust.encode_batch_fast([texts[number] for number in whole], add_special_tokens=False), strict=True
        ):
            ids[number] = np.array(encoding.ids, dtype=np.int32)

        spans: list[Any] = [self._spans_from_special_tokens(one, row) for one, row in zip(rendered, ids, strict=True)]
        unclear = [number for number, found in enumerate(spans) if found is None]
        encodings = self._rust.encode_batch([texts[number] for number in unclear], add_special_tokens=False)
        for number, encoding in zip(unclear, encodings, strict=True):
            spans[number] = spans_from_offsets(encoding, rendered[number].spans)
        return [TokenRow(row, found) for row, found in zip(ids, spans, strict=True)]

    def _spans_from_special_tokens(self, one: Rendered, ids: np.ndarray) -> np.ndarray | None:
        """Flattened token spans, or none where special tokens don't determine them."""
        ends = [match.end() for match in self._special_text.finditer(one.text)]
        at = np.flatnonzero(self._is_special[ids]).tolist()
        if len(ends) != len(at):
            return None
        tokens = []
        for start, end in one.spans:
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


def spans_from_offsets(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Flattened token spans of spans of characters. A token that straddles a span's start belongs to it."""
    tokens = []
    for start, end in spans:
        first = next((token for char in range(start, end) if (token := encoding.char_to_token(char)) is not None), None)
        last = next(
            (token for char in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(char)) is not None), None
        )
        if first is not None and last is not None:
            tokens += (first, last + 1)
    return np.array(tokens, dtype=np.int32)


def truncate(row: TokenRow, max_length: int) -> TokenRow:
    """The first max_length tokens, if one of them is trained (the very first token can't be: nothing predicts it)."""
    spans: Any = np.minimum(row.spans, max_length).reshape(-1, 2)
    spans = spans[spans[:, 1] > np.maximum(spans[:, 0], 1)]
    if len(spans) == 0:
        raise BadRow("no trained token is left after truncation to data.max_length", f"{len(row.ids)} tokens")
    return TokenRow(row.ids[:max_length], spans.reshape(-1))


def drop(row: TokenRow, max_length: int) -> TokenRow:
    raise BadRow("the row is longer than data.max_length", f"{len(row.ids)} tokens")


def refuse(row: TokenRow, max_length: int) -> TokenRow:
    raise RefusedRow(
        f"the row has {len(row.ids)} tokens, data.max_length is {max_length}",
        "Raise data.max_length, or set data.overlong to truncate or drop.",
    )


OVERLONG: dict[str, Callable[[TokenRow, int], TokenRow]] = {"truncate": truncate, "drop": drop, "error": refuse}
