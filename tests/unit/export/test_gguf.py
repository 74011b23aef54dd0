from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.export.gguf.vocabulary import vocabulary_of
from tests.llama_cpp import TEXTS, llama_cpp, next_logprobs, small_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama of 3.1": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi3": {},
}  # fmt: skip
IDS = [1, *range(40, 140, 3)]


def exported(base: Path, place: Path, *settings: str):
    words = [f"model.path={base}", f"export.output_dir={place}", "export.format=gguf", *settings]
    return api.export(load_config("export", words))


def worst(file: Path, expected) -> float:
    """The largest difference of a log-probability of llama.cpp, over the whole vocabulary."""
    with llama_cpp(file) as reader:
        found = reader.next_logprobs(IDS, len(expected))
    assert len(found) == len(expected)
    return max(abs(expected[id] - logprob) for id, logprob in found.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_log_probabilities_of_transformers(name, tmp_path):
    base = small_model(tmp_path / "base", name.partition(" ")[0], **FAMILIES[name])
    done = exported(base, tmp_path / "out", "export.dtype=fp32", "export.check_rows=1")
    assert done.difference is not None and done.difference.divergence < 1e-6
    assert worst(tmp_path / "out" / "model-F32.gguf", next_logprobs(base, IDS)) < 5e-3


def test_every_dtype_is_as_near_as_its_bits(tmp_path):
    base = small_model(tmp_path / "base", "llama")
    before = next_logprobs(base, IDS)
    for dtype, bound in {"fp16": 1e-2, "bf16": 5e-2, "q8_0": 0.15}.items():
        done = exported(base, tmp_path / dtype, f"export.dtype={dtype}", "export.check_rows=1")
        (file,) = (tmp_path / dtype).glob("*.gguf")
        assert 0 < worst(file, before) < bound
        assert done.difference is not None and 0 < done.difference.divergence < 1e-3
        assert done.num_bytes > file.stat().st_size


def test_an_adapter_is_in_it_and_the_tokenizer_and_the_chat_template_are_the_models_own(tmp_path):
    base = small_model(tmp_path / "base", "llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    exported(base, tmp_path / "out", f"export.adapters={{a: '{tmp_path / 'adapter'}'}}", "export.check_rows=1")
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(tmp_path / "merged")
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(base)
    messages = [{"role": "user", "content": "Hello"}]
    with llama_cpp(tmp_path / "out" / "model-F32.gguf") as reader:
        found = reader.next_logprobs(IDS, 5)
        expected = next_logprobs(tmp_path / "merged", IDS)
        assert all(abs(expected[id] - logprob) < 5e-3 for id, logprob in found.items())
        for text in TEXTS:
            assert reader.tokenize(text) == tokenizer(text)["input_ids"]
        assert reader.rendered(messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    fields = GGUFReader(tmp_path / "out" / "model-F32.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id


def test_chat_templates_with_names_are_kept(tmp_path):
    base = small_model(tmp_path / "base", "llama")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    given = PreTrainedTokenizerFast.from_pretrained(base).chat_template
    assert isinstance(given, dict) and given.keys() == {"default", "tool_use"}
    exported(base, tmp_path / "hf", "export.format=hf", "export.check=false")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf").chat_template == given
    exported(base, tmp_path / "gguf", "export.check=false")
    fields = GGUFReader(tmp_path / "gguf" / "model-F32.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == given["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == given["tool_use"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "lora",
    [{"r": 4, "lora_alpha": 6}, {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}],
    ids=["one scale", "scales by layer"],
)
def test_an_adapter_alone_is_on_its_base_in_llama_cpp_what_it_is_in_peft(family, lora, tmp_path):
    base = small_model(tmp_path / "base", family, **FAMILIES[family])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(**lora, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    settings = [f"export.adapters={{a: '{tmp_path / 'adapter'}'}}", "export.check_rows=1"]
    done = exported(base, tmp_path / "lora", "export.format=gguf_lora", *settings)
    assert done.difference is not None and done.difference.divergence < 1e-6
    assert "The adapter of " in (tmp_path / "lora" / "README.md").read_text()
    exported(base, tmp_path / "out", "export.check=false")
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(tmp_path / "merged")
    expected, without = next_logprobs(tmp_path / "merged", IDS), next_logprobs(base, IDS)
    with llama_cpp(tmp_path / "out" / "model-F32.gguf", tmp_path / "lora" / "adapter-F32.gguf") as reader:
        found = reader.next_logprobs(IDS, len(expected))
    assert max(abs(expected[id] - logprob) for id, logprob in found.items()) < 2e-2
    assert max(abs(without[id] - logprob) for id, logprob in found.items()) > 0.1


@pytest.mark.parametrize(
    ("lora", "words", "said"),
    [
        ({"use_dora": True}, [], "must be plain LoRA to be written alone, and is with DoRA"),
        ({"modules_to_save": ["lm_head"]}, [], "and is with whole modules"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, [], "embed_tokens is not one"),
        ({}, ["export.dtype=q8_0"], "export.dtype must be auto or one of"),
        (None, [], "must be one adapter .* there are 0"),
    ],
)
def test_an_adapter_that_llama_cpp_has_no_form_for_is_refused(lora, words, said, tmp_path):
    base = small_model(tmp_path / "base", "llama")
    if lora is not None:
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | lora)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
        words = [f"export.adapters={{a: '{tmp_path / 'adapter'}'}}", *words]
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out", "export.format=gguf_lora", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "settings", "words", "said"),
    [
        ("gpt_neox", {}, [], "gpt_neox is not one of llama"),
        ("mistral", {"sliding_window": 16}, [], "sliding window of 16"),
        ("llama", {"mlp_bias": True}, [], "mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, [], "scaled by dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 99}, [], "query_pre_attn_scalar"),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2}, [], "every sixth"),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0}, [], "softcaps"),
        ("phi3", {"sliding_window": 16}, [], "sliding window of 16"),
        ("llama", {}, ["export.format=hf", "export.dtype=q8_0"], "export.dtype must be auto or one of"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_anything_is_written(
    tmp_path, model_type, settings, words, said
):
    base = small_model(tmp_path / "base", model_type, **settings)
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out", *words)
    assert [place.name for place in tmp_path.iterdir()] == ["base"]


def program(place: Path, text: str) -> Path:
    place.write_text(f"#!/bin/sh\n{text}\n")
    place.chmod(0o755)
    return place


def test_llama_quantize_gets_the_whole_file_and_its_own_is_left(tmp_path):
    base = small_model(tmp_path / "base", "llama")
    copies = program(tmp_path / "llama-quantize", f'echo "$@" > {tmp_path / "asked"}; cp "$1" "$2"')
    done = exported(base, tmp_path / "out", "export.dtype=q4_k_m", f"export.llama_quantize={copies}", "export.check_rows=1")
    assert [file.name for file in (tmp_path / "out").glob("*.gguf")] == ["model-Q4_K_M.gguf"]
    whole, place, dtype = (tmp_path / "asked").read_text().split()
    assert (Path(whole).name, Path(place).name, dtype) == ("model-F32.gguf", "model-Q4_K_M.gguf", "Q4_K_M")
    assert done.difference is not None and done.difference.divergence < 1e-6


@pytest.mark.parametrize("text", ["echo no such type >&2; exit 3", "echo no such type"])
def test_what_llama_quantize_says_is_the_error_and_nothing_is_left(text, tmp_path):
    base = small_model(tmp_path / "base", "llama")
    fails = program(tmp_path / "llama-quantize", text)
    with pytest.raises(ResourceError, match="no such type"):
        exported(base, tmp_path / "out", "export.dtype=q4_k_m", f"export.llama_quantize={fails}")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["base", "llama-quantize"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.dtype=q4_k_m"], "export.llama_quantize must name llama.cpp's program llama-quantize"),
        (["export.dtype=q4_k_m", "export.llama_quantize=/no/such"], "export.llama_quantize must be a program .* got '/no/such'"),
        (["export.llama_quantize=/bin/true"], "export.llama_quantize is for export.format=gguf or ollama with export.dtype=q2_k"),
        (["export.dtype=q4_k_m", "export.format=hf"], "export.dtype must be auto or one of"),
    ],
)
def test_llama_quantize_is_asked_for_and_looked_for_before_anything_is_written(words, said, tmp_path):
    base = small_model(tmp_path / "base", "llama")
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE that falls back to bytes, as of Llama 2."""
    pieces = ["\u2581", "a", "b", "ab", "aba"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {piece: len(vocab) + n for n, piece in enumerate(pieces)}
    merges = [("a", "b"), ("ab", "a")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges():
    found = vocabulary_of(sentencepiece_like(), 270, [2], "base")
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert found.model == "llama" and found.adds_space and len(found.tokens) == 270
    assert scores["ab"] > scores["aba"] > scores["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for how its tokenizer splits"),
        ({"pre_tokenizer": None}, "no name for how its tokenizer splits"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path, change, said):
    base = small_model(tmp_path / "base", "llama")
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        exported(base, tmp_path / "out")
