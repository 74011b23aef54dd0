"""Grammar-constrained decoding with xgrammar: bitmasks of the tokens that each row's grammar allows next."""

from __future__ import annotations

import re
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from raytune_llm.engines.requests import Grammar
from raytune_llm.errors import ConfigError, ResourceError

MAX_GRAMMAR_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 64
"""Brackets within brackets. xgrammar takes memory and time without end for schemas of hundreds."""
MAX_WHITESPACE = 20
"""White space characters in one place of a JSON answer: a line break and an indentation. Without a limit, small models write line
breaks until their tokens are used up."""
MAX_COMPILE_THREADS = 1
WHERE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""The time and the line of its source that xgrammar writes before a message."""
CACHE_BYTES = 256 * 2**20
"""The size of the cache of compiled grammars, since clients may send any number of them."""


class Grammars:
    """Compiles grammars for one vocabulary, with a cache of the most recent ones."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...], *, cache_bytes: int = CACHE_BYTES) -> None:
        try:
            import xgrammar
        except ImportError:
            raise ResourceError(
                "answers by a grammar or a JSON schema need xgrammar", "Install it: pip install 'raytune-llm[serve]'."
            ) from None
        self._xgrammar = xgrammar
        self._vocab_size = vocab_size
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(end_ids))
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=MAX_COMPILE_THREADS, cache_enabled=True, cache_limit_bytes=cache_bytes
        )

    @property
    def kept_bytes(self) -> int:
        return self._compiler.get_cache_size_bytes()

    def matcher(self, grammar: Grammar) -> Any:
        """A matcher for one answer. Raises ConfigError for a grammar that xgrammar does not support."""
        if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
            raise ConfigError("the grammar", f"must have at most {MAX_GRAMMAR_CHARACTERS} characters", got=len(grammar.text))
        if grammar.kind in ("json_schema", "structural_tag") and (depth := _depth(grammar.text)) > MAX_SCHEMA_DEPTH:
            raise ConfigError("a JSON schema", f"must have at most {MAX_SCHEMA_DEPTH} brackets within each other", got=depth)
        compile_one = {
            "json_schema": partial(self._compiler.compile_json_schema, max_whitespace_cnt=MAX_WHITESPACE),
            "json": lambda text: self._compiler.compile_builtin_json_grammar(),
            "regex": self._compiler.compile_regex,
            "ebnf": self._compiler.compile_grammar,
            "structural_tag": self._compiler.compile_structural_tag,
        }[grammar.kind]
        try:
            matcher = self._xgrammar.GrammarMatcher(compile_one(grammar.text))
        except (RuntimeError, ValueError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            problem = WHERE.sub("", lines[-1])
            raise ConfigError("the grammar", f"must be one that xgrammar compiles ({problem})", got=grammar.kind) from None
        mask_1W = self.bitmask([matcher])
        if mask_1W is None or not mask_1W.any():
            raise ConfigError("the grammar", "must allow a text, and allows none", got=grammar.kind)
        return matcher

    def bitmask(self, matchers: list[Any | None]) -> Tensor | None:
        """The allowed tokens of each row, int32 [R, ceil(V / 32)] on the host, one bit per token; None if no row has a
        grammar."""
        if not any(matchers):
            return None
        mask_RW = torch.full((len(matchers), (self._vocab_size + 31) // 32), -1, dtype=torch.int32)
        for number, matcher in enumerate(matchers):
            if matcher is not None and not matcher.is_terminated():
                matcher.fill_next_token_bitmask(mask_RW, number)
        return mask_RW


def _depth(text: str) -> int:
    """The depth to which the brackets of a JSON text are nested. Brackets in strings don't count."""
    brackets = re.sub(r'"(?:[^"\\]|\\.)*"|[^{}\[\]"]+', "", text)
    return max(accumulate(1 if bracket in "{[" else -1 for bracket in brackets), default=0)
