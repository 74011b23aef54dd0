"""Batch generation with transformers' own `generate`, for models whose state does not fit the paged cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.engines.requests import Completion, Request, Sampling
from raytune_llm.models.adapters import Adapters, PeftAdapters
from raytune_llm.models.generation_config import end_ids_of
from raytune_llm.models.load import auto_class


class HFEngine:
    """Answers requests with a model that is already in memory. It may have several adapters, of which one is active at a time.

    Prompts are padded on the left, and attention must be transformers' own. `generate` restores the model's train or eval mode,
    its active adapter and the global random state. Answers depend only on the requests, but requests in one batch change each
    other's rounding and, when sampling, each other's random numbers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        adapters: Adapters | None = None,
        batch_size: int = 32,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """adapters: those of the model, if it has any. stop_ids: tokens that end an answer, in addition to those of the model and
        the tokenizer."""
        self._adapters: Adapters = adapters or PeftAdapters(model)
        self._model: Any = self._adapters.base
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._added: set[str] = set()
        """The adapters that the engine has added to the model."""
        self._end_ids = tuple(dict.fromkeys([*end_ids(model, tokenizer), *stop_ids]))
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._end_ids[0]

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> HFEngine:
        """Load a model and its tokenizer from a folder or hub id. adapters: the name that requests use -> the adapter's
        folder."""
        model: Any = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=dtype)
        engine = cls(model.to(device), AutoTokenizer.from_pretrained(path), batch_size=batch_size)
        for name, folder in (adapters or {}).items():
            engine.add_adapter(name, folder)
        return engine

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in their order."""
        prompts = [self._prompt_ids(request) for request in requests]
        groups: dict[tuple[str | None, Sampling], list[int]] = defaultdict(list)
        for index in sorted(range(len(requests)), key=lambda index: len(prompts[index])):
            groups[requests[index].adapter, requests[index].sampling].append(index)

        completions: dict[int, Completion] = {}
        for (adapter, sampling), indices in groups.items():
            with self._ready(adapter):
                for start in range(0, len(indices), self._batch_size):
                    batch = indices[start : start + self._batch_size]
                    answers = self._generate_batch([prompts[index] for index in batch], sampling)
                    completions.update(zip(batch, answers, strict=True))
        return [completions[index] for index in range(len(requests))]

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter from PEFT's folder `path`, for requests that name it."""
        self._adapters.add(name, SavedAdapter(path=str(path), setting=f"the adapter {name}"))
        self._added.add(name)

    def remove_adapter(self, name: str) -> None:
        self._added.remove(name)
        self._adapters.remove(name)

    def close(self) -> None:
        """Remove the engine's adapters from the model, and drop the reference to it."""
        for name in list(self._added):
            self.remove_adapter(name)
        del self._model, self._adapters

    def _prompt_ids(self, request: Request) -> Sequence[int]:
        if request.conversation is None:
            return request.prompt_ids
        text = self._template.prompt(request.conversation)
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @contextmanager
    def _ready(self, adapter: str | None) -> Iterator[None]:
        """A context in which the adapter is active and the model in eval mode, without compiled layers."""
        was_training = self._model.training
        self._model.eval()
        # Each decoded token has a new shape, for which compiled layers would be compiled again.
        eager, in_use = (
            torch.compiler.set_stance("force_eager"),
            nullcontext() if adapter is None else self._adapters.using(adapter),
        )
        try:
            with eager, in_use:
                yield
        finally:
            self._model.train(was_training)

    @torch.no_grad()  # not inference_mode, whose tensors (cached rotary tables, gathered weights) can't be used in training
    def _generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        ids_BT, mask_BT = pad_left(prompts, self._pad_id)
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            out_BT = self._model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=self._config(sampling),
            )
        return [
            self._completion(new_ids, len(prompt))
            for new_ids, prompt in zip(out_BT[:, ids_BT.shape[1] :].tolist(), prompts, strict=True)
        ]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        # Options that are not set here would be taken from the model's generation config.
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=list(self._end_ids),
            pad_token_id=self._pad_id,
        )

    def _completion(self, new_ids: list[int], prompt_tokens: int) -> Completion:
        end = next((place for place, token in enumerate(new_ids) if token in self._end_ids), None)
        ids = tuple(new_ids[:end])
        return Completion(
            ids=ids,
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
            finish="length" if end is None else "stop",
            prompt_tokens=prompt_tokens,
        )


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's EOS, with which the model was trained, and those of its generation
    config."""
    named = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys([*named, *end_ids_of(model.generation_config)]))


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids_BT and mask_BT (1 for a token, 0 for padding), both int64, with every prompt's last token in the last column."""
    length = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), length), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, length - len(prompt) :] = 1
    return ids_BT, mask_BT
