"""Rendered texts -> token rows, a block at a time: one call into the tokenizer's Rust, no Python per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates import Rendered
from raytune_llm.records import TokenRow


def tokenize(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerFast, *, max_length: int, overlong: str
) -> Iterator[TokenRow | BadRow | RefusedRow]:
    """The token row of each text in order, or why there is none.

    Ids are those of the whole text, and equal `apply_chat_template`'s: the template holds the special tokens, none is added.
    """
    # encode_batch returns Encodings, of which only ids and the tokens at the spans' ends are looked at.
    encodings = tokenizer.backend_tokenizer.encode_batch([one.text for one in rendered], add_special_tokens=False)
    shorten = OVERLONG[overlong]
    for one, encoding in zip(rendered, encodings, strict=True):
        row = TokenRow(np.array(encoding.ids, dtype=np.int32), token_spans(encoding, one.spans))
        try:
            yield row if len(row.ids) <= max_length else shorten(row, max_length)
        except (BadRow, RefusedRow) as bad:
            yield bad


def token_spans(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Character spans as token spans, flattened. A token that straddles a span's start belongs to it."""
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
    spans = np.minimum(np.asarray(row.spans), max_length).reshape(-1, 2)
    spans = spans[spans[:, 1] > np.maximum(spans[:, 0], 1)]
    if len(spans) == 0:
        raise BadRow("no trained token is left after truncation to data.max_length", f"{len(row.ids)} tokens")
    return TokenRow(np.asarray(row.ids)[:max_length], spans.reshape(-1))


def drop(row: TokenRow, max_length: int) -> TokenRow:
    raise BadRow("the row is longer than data.max_length", f"{len(row.ids)} tokens")


def refuse(row: TokenRow, max_length: int) -> TokenRow:
    raise RefusedRow(
        f"the row has {len(row.ids)} tokens, data.max_length is {max_length}",
        "Raise data.max_length, or set data.overlong to truncate or drop.",
    )


OVERLONG: dict[str, Callable[[TokenRow, int], TokenRow]] = {"truncate": truncate, "drop": drop, "error": refuse}
