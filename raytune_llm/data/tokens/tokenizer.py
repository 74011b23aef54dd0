"""Loads the tokenizer of a run: the model's own, another one, or the built-in byte tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from raytune_llm import packaged
from raytune_llm.config.data import DataConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.data.templates.chat_template import answer_end, suggested
from raytune_llm.data.templates.named import NamedTemplate, apply_to_tokenizer, guess, load, stop_tokens
from raytune_llm.data.tokens.vocabulary import add_new_tokens, new_tokens
from raytune_llm.errors import ConfigError, first_line
from raytune_llm.remote_code import announce

BYTES = "bytes"
NO_CLASS_OF_THEIR_OWN = ("llama", "qwen3", "granite", "olmo2", "smollm3")
"""Model types for which transformers has no tokenizer class of its own, so that the class in the files is used."""
ANY_FAST = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of transformers' class that follows tokenizer.json without changes of its own."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def run_tokenizer(
    model: ModelConfig, data: DataConfig, *, needs_template: bool = True
) -> tuple[PreTrainedTokenizerFast, NamedTemplate | None]:
    """The tokenizer of a run, with model.new_tokens, and the named template that it was given; None if it keeps its own.

    needs_template: False for plain text, where a tokenizer without a template may stay as it is.

    Raises ConfigError if the tokenizer, or what a named template adds to it, has more tokens than the model has embeddings,
    unless model.resize_vocab adds them.
    """
    tokenizer = _unchanged(model)
    described = new_tokens(model)
    _check_embeddings(tokenizer, model)
    template = _take_template(tokenizer, model, data, needs_template=needs_template)
    add_new_tokens(tokenizer, described)
    return tokenizer, template


def first_pieces(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """Id of each token that the run adds -> the ids of the model's tokens whose mean embedding initializes it.

    tokenizer: the run's tokenizer, from run_tokenizer.
    """
    if not model.adds_tokens:
        return {}
    before, described = _unchanged(model), new_tokens(model)
    known = before.get_vocab()
    added = {token: id for token, id in tokenizer.get_vocab().items() if token not in known}
    if not model.resize_vocab:
        added = {token: id for token, id in added.items() if token in described}
    encode = before.backend_tokenizer.encode
    return {id: encode(described.get(token, token), add_special_tokens=False).ids for token, id in added.items()}


def _unchanged(model: ModelConfig) -> PreTrainedTokenizerFast:
    return load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        kind=model.tokenizer,
        needs_chat_template=False,
    )


def _take_template(
    tokenizer: PreTrainedTokenizerFast, model: ModelConfig, data: DataConfig, *, needs_template: bool
) -> NamedTemplate | None:
    """Give the tokenizer the named template, if there is one."""
    name = data.template
    if name is None and tokenizer.chat_template is None and needs_template:
        name = guess(model.path or model.tokenizer or "")
        if name is None:
            raise ConfigError(
                "data.template",
                "must name a template: the tokenizer has none, and the model's name does not identify one",
                got="null",
                fix="For example, data.template=chatml.",
            )
    if name is None:
        return None
    template = load(name, default_system=data.default_system, tool_format=data.tool_format, date=data.today)
    if template.efficient_eos and data.train_on_prompt:
        raise ConfigError("data.train_on_prompt", f"must be false with data.template={name}", got=True, fix="Choose another one.")
    other = "null for the model's own" if tokenizer.chat_template else suggested(tokenizer)
    added = apply_to_tokenizer(tokenizer, template)
    if not model.resize_vocab:
        _check_embeddings(tokenizer, model, name, added, other)
    return template


def _check_embeddings(
    tokenizer: PreTrainedTokenizerFast, model: ModelConfig, template: str = "", added: Sequence[str] = (), other: str = ""
) -> None:
    """Raises ConfigError if the model has too few embeddings. added: tokens that the template added. other: a template that
    fits."""
    room = _num_embeddings(model)
    if room is None or len(tokenizer) <= room:
        return
    if added:
        raise ConfigError(
            "data.template",
            f"must use tokens that the model has: its {room} embeddings lack {', '.join(added)}",
            got=template,
            fix=f"Set data.template={other}, or model.resize_vocab=true to add and train them.",
        )
    raise ConfigError(
        "model.tokenizer", f"must have at most the model's {room} entries", got=len(tokenizer),
        fix="Set model.tokenizer=null to use the model's own.",
    )  # fmt: skip


def _num_embeddings(model: ModelConfig) -> int | None:
    """The number of the model's embeddings; None if it follows from the tokenizer (a model that is built from a config)."""
    if "vocab_size" in model.config or model.path is None:
        return model.config.get("vocab_size")
    folder = Path(packaged.resolve(model.path))
    try:  # a hub's config was cached when the tokenizer was loaded
        there = folder.is_dir()
        file = folder / "config.json" if there else cached_file(model.path, "config.json", revision=model.revision)
        config = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        sizes = [part["vocab_size"] for part in (config.get("text_config"), config) if part and "vocab_size" in part]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # loading the model reports what is wrong with the config
    return sizes[0] if sizes else None


def stop_ids(tokenizer: PreTrainedTokenizerFast, template: NamedTemplate | None) -> list[int]:
    """The ids of the tokens that end an answer: eos_token_id of a run's saved generation config, and where engines stop.

    They include the token with which the chat template ends an answer, since that is what is trained; the tokenizer's own end
    token may be another one.
    """
    named = (tokenizer.eos_token,) if template is None else stop_tokens(tokenizer, template)
    ends = dict.fromkeys(str(token) for token in (*named, answer_end(tokenizer)) if token is not None)
    ids = map(tokenizer.backend_tokenizer.token_to_id, ends)
    return [id for id in ids if id is not None]


def load_tokenizer(
    path: str | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: str | None = None,
    needs_chat_template: bool = True,
) -> PreTrainedTokenizerFast:
    """The tokenizer that `kind` names (`bytes`, a folder or a hub id), or if it is None, that of the model at `path`."""
    if kind == BYTES:
        return byte_tokenizer()
    setting, place = ("model.path", path) if kind is None else ("model.tokenizer", kind)
    assert place is not None, "model.path or model.tokenizer is given"
    folder = packaged.resolve(place, setting)
    revision = revision if kind is None else None
    try:
        if trust_remote_code:
            announce(folder, revision)
        tokenizer: Any = _loader(Path(folder)).from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # libraries raise many kinds of errors for a damaged file
        what = (
            "holds no tokenizer"
            if Path(folder).is_dir()
            else "names neither a local folder nor a tokenizer on a hub that answers"
        )
        reason = first_line(error)
        fix = f"({reason}). Check {setting}, or set model.tokenizer to a folder that has one."
        raise ConfigError(setting, what, got=place, fix=fix) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            setting, "must have a tokenizer.json (a fast tokenizer)", got=place, fix="Convert it with transformers."
        )
    if needs_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            setting,
            "must have a chat template",
            got=place,
            fix="Choose the model's chat version, or set data.template or model.tokenizer.",
        )
    return tokenizer


def _loader(folder: Path) -> Any:
    """The class that AutoTokenizer would choose, if that is certain, else AutoTokenizer, whose import loads torch (seconds)."""
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        named = settings["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        model_type, named, settings = None, None, {}
    if model_type in NO_CLASS_OF_THEIR_OWN and named in ANY_FAST and "auto_map" not in settings:
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: id b is the byte b, then come ChatML's two special tokens and a padding token."""
    alphabet = dict(zip(range(256), byte_characters(), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in alphabet.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that determines the ids of a text: the Rust tokenizer, its special tokens and the chat template."""
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
