"""A runner for models whose state does not fit the paged cache: transformers' own forward pass and cache, one row at a time.

The engine is the native one (requests, sampling, grammars, loading of adapters). A step computes its rows one after another, each
with its own transformers cache and its own active adapter. Rows with different adapters thus run concurrently, but not in one
pass. A prompt is computed in one piece, since transformers' recurrent layers can't continue a state with several tokens.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from raytune_llm import packaged
from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.serve import HFEngine as HFSettings
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.sampler import scored_tokens
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.native.scoring import ScoredText
from raytune_llm.engines.native.slots import Bank
from raytune_llm.engines.requests import ScoredToken
from raytune_llm.errors import ConfigError, DataError
from raytune_llm.models.adapters import OWN, PeftAdapters
from raytune_llm.models.adapters.saved import CONFIG, WEIGHTS, rank_of, read_config
from raytune_llm.models.lora_starts import changes_the_base
from raytune_llm.models.multimodal import text_model
from raytune_llm.models.score_head import refuse_separate_head
from raytune_llm.models.vocabulary import grow

BLOCK_SIZE = 16
CACHE_NAMES = ("past_key_values", "cache_params")
"""The argument of `forward` for the cache: of most models, and of state-space models."""


def hf_engine(settings: HFSettings, serving: Serving) -> NativeEngine:
    """The engine with its model loaded. Raises ConfigError for a quantization, and for a score head in a separate file."""
    if serving.quantization.replaces_layers:
        raise ConfigError("quantization", "must be none with engine=hf", got=serving.quantization.name)
    if serving.head is not None:
        fix = "Use engine=native."
        raise ConfigError("engine", "must be native for a reward model whose head is in a file of its own", got="hf", fix=fix)
    model = _load(serving, serving.device)
    limit = serving.limit or settings.max_length
    runner = HFRunner(
        model,
        weightless=lambda: PeftAdapters(_load(serving, torch.device("meta"))),
        num_slots=serving.max_adapters,
        num_blocks=settings.max_rows * -(-limit // BLOCK_SIZE),
        own=serving.adapter,
        scores=serving.scores,
        new_ids=serving.new_ids,
    )
    return NativeEngine(
        runner,
        serving.tokenizer,
        end_ids=serving.end_ids,
        max_length=limit,
        max_rows=settings.max_rows,
        step_tokens=settings.max_rows * limit,  # so that no prompt is cut
        pass_tokens=1,  # texts are computed one by one
        max_host_adapters=serving.max_host_adapters,
        prefix_cache=False,
        own_adapter=serving.adapter_name,
    )


def _load(serving: Serving, device: torch.device) -> Any:
    """The model; without weights on the meta device."""
    transformers.logging.disable_progress_bar()
    auto: Any = transformers.AutoModelForSequenceClassification if serving.scores else transformers.AutoModelForCausalLM
    model, settings = serving.model, {"dtype": serving.compute, "trust_remote_code": serving.model.trust_remote_code}
    config = serving.config
    if serving.scores:
        config.num_labels = 1
    if device.type == "meta" or model.weights == "random":
        with torch.random.fork_rng(devices=[]), device:
            torch.manual_seed(0)
            return auto.from_config(config, **settings).eval()
    path = packaged.resolve(str(model.path))
    return auto.from_pretrained(path, config=config, revision=model.revision, **settings).to(device).eval()


class Copied:
    """A copy of an adapter's files, which stays valid if the files are replaced."""

    def __init__(self, folder: Path) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="raytune-llm-adapter-")
        self.path = self._kept.name
        for name in (WEIGHTS[0], CONFIG):
            if not (folder / name).is_file():
                raise DataError(str(folder), f"is no folder with {name}", "Save the adapter as safetensors.")
            shutil.copyfile(folder / name, Path(self.path) / name)


class HFBank:
    """Implements Bank with one PEFT adapter per slot."""

    def __init__(self, adapters: PeftAdapters, num_slots: int) -> None:
        self.adapters, self.num_slots = adapters, num_slots

    def load(self, slot: int, weights: Copied) -> None:
        self.clear(slot)
        self.adapters.add(str(slot), SavedAdapter(path=weights.path, setting="the adapter"))

    def clear(self, slot: int) -> None:
        if str(slot) in self.adapters.names:
            self.adapters.remove(str(slot))


class HFRunner:
    """Implements the engine's Runner."""

    block_size = BLOCK_SIZE
    sampled = None

    def __init__(
        self,
        model: Any,
        *,
        weightless: Callable[[], PeftAdapters],
        num_slots: int,
        num_blocks: int,
        own: SavedAdapter | None = None,
        scores: bool = False,
        new_ids: Sequence[int] = (),
    ) -> None:
        """weightless: makes the adapters of a copy of the model on the meta device, on which new adapters are checked. own: an
        adapter that is part of the model. new_ids: the tokens that it adds."""
        grow(model, dict.fromkeys(new_ids, ()))
        self._adapters = PeftAdapters(model, scores=scores)
        if own is not None:
            self._adapters.add_own(own, new_ids)
        self._model = model
        self.num_blocks, self.device = num_blocks, model.device
        self._without_bank = None if own is None else OWN
        self.bank: Bank | None = None if own is not None else HFBank(self._adapters, num_slots)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._weightless, self._checked_on, self._checking = weightless, weightless(), threading.Lock()
        taken = inspect.signature(type(model).forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[0])
        self._caches: WeakKeyDictionary[Row, Any] = WeakKeyDictionary()

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        logits_RV = [self._forward(*piece) for piece in pieces]
        wanted = [logits_V for piece, logits_V in zip(pieces, logits_RV, strict=True) if piece.samples]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size, device=self.device)

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, slot: int) -> list[list[float]]:
        results = []
        for ids in prompts:
            ids_BT = torch.tensor([list(ids)], device=self.device)
            if pooling == "score":
                results.append(self._model(input_ids=ids_BT, use_cache=False).logits[0].float().tolist())
                continue
            with self._adapters.using(self._without_bank if slot < 0 else str(slot)):
                hidden_TD = text_model(self._model)(input_ids=ids_BT, use_cache=False).last_hidden_state[0].float()
            results.append(F.normalize(hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1], dim=0).tolist())
        return results

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int, *, top: int = 0
    ) -> list[list[ScoredToken]]:
        results = []
        for prompt, answer in zip(prompts, answers, strict=True):
            with self._adapters.using(self._without_bank if slot < 0 else str(slot)):
                ids_BT = torch.tensor([[*prompt, *answer[:-1]]], device=self.device)
                logits_TV = self._model(input_ids=ids_BT, use_cache=False).logits[0].float()
            logits_NV = logits_TV[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            targets_N = torch.tensor(list(answer), dtype=torch.int64, device=self.device)
            results.append(scored_tokens(logits_NV, targets_N, top))
        return results

    def scored(self, texts: Sequence[ScoredText]) -> list[ScoredToken]:
        raise AssertionError("rows of transformers' own caches share no prefix")

    def read_adapter(self, folder: Path) -> tuple[Copied, int]:
        refuse_separate_head(folder, "the adapter")
        copied = Copied(folder)
        try:
            self._check(copied.path)
            return copied, rank_of(copied.path, "the adapter")
        except ConfigError as error:
            got = str(folder) if error.got == copied.path else error.got
            raise ConfigError(error.setting, error.rule, got=got, fix=error.fix, instead=error.instead) from error

    def _check(self, path: str) -> None:
        """Raises ConfigError for an adapter that doesn't fit the model, or that would change it for others."""
        config = read_config(path, "the adapter")
        start = getattr(config, "init_lora_weights", True)
        if changes_the_base(start) or getattr(config, "layer_replication", None):
            what = f"init_lora_weights={start}" if changes_the_base(start) else "layer_replication"
            rule = f"must leave the base as it is, which others use too, and {what} changes it"
            raise ConfigError("the adapter", rule, got=path, fix="Merge it into its base by `export`.")
        with self._checking:
            try:
                self._checked_on.add("tried", SavedAdapter(path=path, setting="the adapter"))
                self._checked_on.remove("tried")
            except Exception:
                self._checked_on = self._weightless()  # PEFT may have put a part of it into the layers
                raise

    def _forward(self, row: Row, start: int, stop: int) -> Tensor:
        """float32 [V]: logits after the row's tokens up to `stop`, of which those before `start` are in its cache."""
        if start == 0:
            self._caches[row] = transformers.DynamicCache(config=self._model.config.get_text_config())
        ids_BT = torch.tensor([row.ids[start:stop]], device=self.device)
        with self._adapters.using(self._without_bank if row.slot < 0 else str(row.slot)):
            out = self._model(input_ids=ids_BT, use_cache=True, **{self._cache_name: self._caches[row]})
        return out.logits[0, -1].float()
