"""A tokenizer as the metadata of a GGUF file, such that llama.cpp produces the same tokens.

llama.cpp knows the expressions that split a text only by names of its own (tokenizer.ggml.pre). Which name a tokenizer has is
read from its tokenizer.json; one that splits by another expression is refused, since it would get other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from raytune_llm.errors import ConfigError

GPT2 = "gpt-2"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {SPLIT.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe", SPLIT.replace("DIGITS", r"\p{N}"): "qwen2"}
"""llama.cpp's name of each expression, as llama-vocab.cpp has them (Llama 3; Qwen 2 to 3)."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character for a space in SentencePiece's tokens."""
NO_SCORE = -1000.0
"""The score of a token that no merge produces, low enough that llama.cpp never merges to it."""


@dataclass(frozen=True)
class Vocabulary:
    """The metadata of a tokenizer in a GGUF file."""

    model: str
    """gpt2: byte-level BPE by merges. llama: SentencePiece's BPE by scores."""
    pre: str
    tokens: Sequence[str]
    """Tokens by id, one for each embedding of the model."""
    kinds: Sequence[TokenType]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    """Special token (bos, eos, eot, eom, unk, pad) -> id."""
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | Sequence[Mapping[str, str]] | None
    """One chat template, or name -> template."""

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, id in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{SPECIAL_KEYS[name]}_token_id", id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(self.adds_space)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}


def vocabulary_of(tokenizer: Any, size: int, stop_ids: Sequence[int], got: str) -> Vocabulary:
    """The Vocabulary of a fast tokenizer. size: number of the model's embeddings. stop_ids: the generation config's. got: the
    model's name, for the message. Raises ConfigError where llama.cpp has no such tokenizer."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = described["model"], described["added_tokens"]
    if model["type"] != "BPE":
        raise _unknown(f"its tokenizer is {model['type']}, not BPE", got)
    vocab: dict[str, int] = model["vocab"]
    if max([*vocab.values(), *(token["id"] for token in added)]) >= size:
        raise _unknown(f"its tokenizer has more tokens than its {size} embeddings", got)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    bytewise = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{id}]" for id in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, id in vocab.items():
        tokens[id], kinds[id] = token, TokenType.BYTE if bytewise and _is_byte(token) else TokenType.NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    begins, ends = _added_around(tokenizer)
    return Vocabulary(
        model="llama" if bytewise else "gpt2",
        pre="default" if bytewise else _pre(described, got),
        tokens=tokens,
        kinds=kinds,
        merges=[] if bytewise else [" ".join(part.replace(" ", "\u0120") for part in merge) for merge in merges],
        scores=_scores(vocab, merges, tokens, got) if bytewise else [],
        special=_special(tokenizer, stop_ids),
        adds_bos=begins,
        adds_eos=ends,
        adds_space=bytewise and _adds_space(described),
        chat_template=_templates(tokenizer.chat_template),
    )


def _templates(given: str | Mapping[str, str] | None) -> str | Sequence[Mapping[str, str]] | None:
    if not isinstance(given, Mapping):
        return given
    return [{"name": name, "template": template} for name, template in given.items()]


def _pre(described: Mapping[str, Any], got: str) -> str:
    """llama.cpp's name of the regular expression by which a byte-level tokenizer splits a text."""
    steps = described["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = GPT2
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if expression in SPLITS:
            name = SPLITS[expression]
        case _:
            raise _unknown("llama.cpp has no name for how its tokenizer splits a text", got)
    if not described["model"]["merges"]:
        raise _unknown("its tokenizer has no merges", got)
    if name != "llama-bpe" and described["model"].get("ignore_merges"):
        raise _unknown(
            "its tokenizer looks up whole words before merging (ignore_merges), which llama.cpp only does for Llama 3", got
        )
    return name


def _scores(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], tokens: Sequence[str], got: str) -> list[float]:
    """The score of each token; llama.cpp merges to the highest first. It merges any two neighbours whose joined text is a token,
    so this raises ConfigError unless the tokenizer has all these merges."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    known = set(merges)
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if token in first and pair[0] in vocab and pair[1] in vocab and pair not in known:
                raise _unknown(f"its tokenizer does not merge {pair[0]} and {pair[1]}, which llama.cpp would", got)
    return [-float(first[token]) if token in first else NO_SCORE for token in tokens]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    steps: Any = described["normalizer"] or {"type": "none"}
    steps = steps["normalizers"] if steps["type"] == "Sequence" else [steps]
    pre = described["pre_tokenizer"] or {"type": "none"}
    prepends = any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in steps)
    return prepends or (pre["type"] == "Metaspace" and pre.get("prepend_scheme", "always") != "never")


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and eos after it."""
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    begins = tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    ends = tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return begins, ends


def _special(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, int]:
    eos = tokenizer.eos_token_id
    stops = list(dict.fromkeys([*([eos] if eos in stop_ids or not stop_ids else []), *stop_ids]))
    found = {"bos": tokenizer.bos_token_id, **dict(zip(("eos", "eot", "eom"), stops, strict=False))}
    found |= {"unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    return {name: id for name, id in found.items() if id is not None}


def _unknown(why: str, got: str) -> ConfigError:
    fix = "Export it as hf, and use a converter of llama.cpp."
    return ConfigError("export.format", f"can't write a GGUF file of this model: {why}", got=got, fix=fix)
