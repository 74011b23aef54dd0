from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raytune_llm.config.load import load_config
from raytune_llm.data.templates.chat_template import suggested
from raytune_llm.data.templates.named import apply_to_tokenizer, load
from raytune_llm.data.tokens.tokenizer import (
    ANY_FAST,
    NO_CLASS_OF_THEIR_OWN,
    byte_tokenizer,
    fingerprint,
    load_tokenizer,
    run_tokenizer,
    stop_ids,
)
from raytune_llm.errors import ConfigError

BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_ids_of_the_byte_tokenizer_are_the_utf8_bytes(text):
    assert BYTES(text)["input_ids"] == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text


def test_the_byte_tokenizers_marks_have_fixed_ids():
    assert BYTES.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|pad|>"]) == [256, 257, 258]
    assert (BYTES.eos_token_id, BYTES.pad_token_id, len(BYTES)) == (257, 258, 259)


def test_the_byte_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "☃"}]
    assert loaded.apply_chat_template(chat)["input_ids"] == BYTES.apply_chat_template(chat)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (257, 258)


def test_the_fingerprint_survives_saving_and_loading(tmp_path):
    BYTES.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == fingerprint(BYTES)


@pytest.mark.parametrize("model_type", [*NO_CLASS_OF_THEIR_OWN, "qwen2", "phi3", "unknown"])
@pytest.mark.parametrize("named", [*ANY_FAST, "Qwen2Tokenizer"])
def test_a_tokenizer_is_of_the_class_that_transformers_chooses(tmp_path, model_type, named):
    BYTES.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": named}))
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert fingerprint(ours) == fingerprint(theirs)


def test_the_fingerprint_changes_with_the_chat_template(tmp_path):
    other = byte_tokenizer()
    other.chat_template = BYTES.chat_template + " "
    assert fingerprint(other) != fingerprint(BYTES)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path holds no tokenizer.*model\.tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    plain = byte_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.tokenizer must have a chat template"):
        load_tokenizer(None, kind=str(tmp_path))


NEW_TO_IT = r"data\.template .*<\|eom_id\|>, <\|eot_id\|>, got 'llama3'.*data\.template=null"
TOO_MANY = r"model\.tokenizer must have at most .* 77 "


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model=smollm2_135m", "data.template=llama3"], NEW_TO_IT),
        (["model=tiny_random", "+model.config.vocab_size=77"], TOO_MANY),
    ],
)
def test_tokens_that_the_model_has_no_embeddings_of_are_refused_before_rows_are_prepared(settings, said):
    run = load_config("prepare", ["data.path=rows.jsonl", *settings])
    with pytest.raises(ConfigError, match=said):
        run_tokenizer(run.model, run.data)


def test_the_end_that_the_chat_template_writes_ends_an_answer_whatever_the_end_token_is_called():
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(tokenizer, None) == [end]
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert stop_ids(tokenizer, None) == [tokenizer.eos_token_id, end]
    gemma = load("gemma")
    apply_to_tokenizer(tokenizer, gemma)
    assert tokenizer.get_vocab()["<end_of_turn>"] in stop_ids(tokenizer, gemma)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, None) == [tokenizer.eos_token_id]


def test_another_template_is_suggested_by_the_tokens_that_there_are():
    vocabulary = {"<｜Assistant｜>": 0, "<think>": 1, "</think>": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])))
    assert suggested(tokenizer) == "deepseekr1"
    assert suggested(byte_tokenizer()) == "qwen"
