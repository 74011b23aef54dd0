"""Tasks of lm-evaluation-harness (Gao et al.): that package asks and scores, and one of our engines answers.

Texts are tokenized, and long prompts truncated on the left, as in that package's `hf` class, so that a model gets the same scores
with both.
"""

from __future__ import annotations

import difflib
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from raytune_llm.engines.questions import Answered, Answering, Question, in_blocks
from raytune_llm.engines.requests import Sampling
from raytune_llm.errors import ConfigError, DataError, UserError, first_line

PACKAGE = Path(__file__).parents[1]
MAX_NEW_TOKENS = 256
"""The default length of an answer, for tasks that don't set one."""
SAMPLED_BY = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
"""The sampling options that a task may set."""
MEANINGLESS = {"do_sample": (True, False), "num_beams": (1,), "use_cache": (True, False), "num_return_sequences": (1,)}
"""Options of a task that have no effect here -> the values that are accepted for them."""
YAML = (".yaml", ".yml")
BOOTSTRAP_SAMPLES = 100_000
"""The number of bootstrap samples for standard errors without a formula; the package's default."""


class TaskScore(NamedTuple):
    value: float
    stderr: float | None
    """The standard error of the value; None if unknown."""
    higher_is_better: bool | None
    """Whether higher values are better; None: the task doesn't say."""


def load_tasks(names: Sequence[str], setting: str) -> dict[str, list[Any]]:
    """Name or path -> the package's tasks or groups. Raises ConfigError, which names the setting, for a name without a task."""
    folders = [name for name in names if _is_folder(name)]
    if missing := [name for name in (*folders, *filter(_is_file, names)) if not Path(name).exists()]:
        raise ConfigError(setting, "must name files and folders that exist", got=missing[0])
    only_files = all(_is_folder(name) or _is_file(name) for name in names)  # indexing the package's tasks takes seconds
    manager = TaskManager(include_path=[Path(folder) for folder in folders] or None, include_defaults=not only_files)
    found: dict[str, list[Any]] = {}
    for name in names:
        if _is_folder(name):
            own = TaskManager(include_path=name, include_defaults=False).all_subtasks
            if not own:
                raise ConfigError(setting, "must name folders that have YAML files of tasks", got=name)
            found |= {task: _loaded(manager, task, setting) for task in own}
        else:
            found[name] = _loaded(manager, name, setting)
    return found


def _is_file(name: str) -> bool:
    return name.endswith(YAML)


def _is_folder(name: str) -> bool:
    return "/" in name and not _is_file(name)


def _loaded(manager: TaskManager, name: str, setting: str) -> list[Any]:
    if not _is_file(name) and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks)
        fix = f"For example, {', '.join(near)}." if near else "`lm-eval ls tasks` lists them."
        raise ConfigError(setting, "must name tasks of lm-evaluation-harness", got=name, fix=fix)
    try:
        loaded: Any = manager.load([name])
    except Exception as error:  # a task runs its own code, and may read its data from anywhere
        rule = f"must name tasks that load with their data ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        raise ConfigError(setting, rule, got=name) from None
    if not loaded["tasks"]:
        raise ConfigError(setting, "must name files with a task", got=name)
    return [*loaded["groups"].values()] or list(loaded["tasks"].values())


def leaves_of(tasks: Sequence[Any]) -> list[Any]:
    """The single tasks, including those of groups."""
    return [leaf for one in tasks for leaf in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]


def questions_of(tasks: Sequence[Any], most: int | None) -> int:
    return sum(min(len(leaf.eval_docs), most or len(leaf.eval_docs)) for leaf in leaves_of(tasks))


def data_of(tasks: Sequence[Any]) -> list[Path]:
    """The local files and folders from which tasks read their rows, as far as their YAML names them."""
    settings = [(leaf.config.dataset_path, leaf.config.dataset_kwargs or {}) for leaf in leaves_of(tasks)]
    named = chain.from_iterable(_texts([path, more.get("data_files"), more.get("data_dir")]) for path, more in settings)
    return [Path(found) for name in dict.fromkeys(named) for found in sorted(glob(name, recursive=True))]


def _texts(setting: Any) -> Iterator[str]:
    if isinstance(setting, str):
        yield setting
    elif isinstance(setting, Mapping | list | tuple):
        for one in setting.values() if isinstance(setting, Mapping) else setting:
            yield from _texts(one)


def run_tasks(
    lm: TemplateLM,
    tasks: Sequence[Sequence[Any]],
    *,
    shots: int | None = None,
    max_questions: int | None = None,
    seed: int = DEFAULT_OTHER_SEED,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    system: str | None = None,
    run_unsafe_code: bool = False,
    stderrs: bool = True,
) -> dict[str, Any]:
    """The package's results; empty if LOCAL_RANK is not 0, since the package returns none there. The states of the global
    generators of Python, numpy and torch are restored.

    shots: the number of examples; None: each task's own. max_questions: the limit for each task.
    """
    state = random.getstate()
    try:
        evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
        results = evaluate(
            lm,
            tasks=[one for found in tasks for one in found],
            task_manager=TaskManager(include_defaults=False),  # otherwise the package indexes all its tasks again
            num_fewshot=shots,
            limit=max_questions,
            bootstrap_iters=BOOTSTRAP_SAMPLES if stderrs else 0,  # bootstrapping some scores starts processes
            system_instruction=system,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=run_unsafe_code,
        )
    except UserError:
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        problem = f"can't be asked or scored ({type(error).__name__}: {first_line(error)})"
        raise DataError("the tasks of lm-evaluation-harness", problem, "Correct the task, or ask it with fewer shots.") from error
    finally:
        random.setstate(state)
    return dict(results or {})


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by our engine, and not by the package or a task's own code."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one called the package
    return any(Path(frame.filename).is_relative_to(PACKAGE) for frame in frames)


def scores_of(results: Mapping[str, Any]) -> dict[str, dict[str, TaskScore]]:
    """Task or group -> metric -> score. A metric is named `acc`, or with its filter `exact_match/strict-match`."""
    found: dict[str, dict[str, TaskScore]] = {}
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{filtered}")
            higher = results["higher_is_better"].get(task, {}).get(metric)
            name = metric if filtered == "none" else f"{metric}/{filtered}"
            stderr = float(error) if isinstance(error, int | float) else None
            found.setdefault(task, {})[name] = TaskScore(float(value), stderr, higher)
    return found


class EngineLM(TemplateLM):
    """The package's model interface, implemented with one or several engines."""

    def __init__(
        self, answer: Answering, tokenizer: Any, adapter: str | None, progress: Callable[[int], None] = lambda more: None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._answer, self._adapter, self._progress = answer, adapter, progress
        self._docs: list[tuple[str | None, int]] = []
        """(task, question number) of the requests that are being answered."""
        self._docs_answered: set[tuple[str | None, int]] = set()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def max_length(self) -> int:
        return self._answer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            has_prefix = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            return self.tokenizer.encode(string, **({"add_special_tokens": False} if has_prefix else {}))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._docs = [_doc(request) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts, in nats, computed in windows of the model's maximum length."""
        self._docs, windows, owners = [], [], []
        for number, request in enumerate(requests):
            (text,) = cast(Any, request.args)
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [(("", text), *make_disjoint_window(window)) for window in rolling]
            windows += own
            owners += [number] * len(own)
            self._docs += [_doc(request)] * len(own)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """requests: (texts, ids of the context, ids of the continuation). Returns, for each continuation, its log-likelihood in
        nats and whether greedy decoding would generate it."""
        questions = []
        for (_, text), before, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                fix = "Change the task, or ask a model of more positions."
                raise DataError("the tasks", f"have a continuation of {len(continuation)} tokens: {text[:200]!r}", fix)
            room = self.max_length + 1 - len(continuation)
            questions.append(Question(tuple(before[-room:]), tuple(continuation), self._adapter, None, shares_prefix=True))
        return [(sum(one.logprobs), one.likeliest) for one in self._answered(questions)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._docs = [_doc(request) for request in requests]
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        questions, stops = [], []
        for number, request in enumerate(requests):
            context, settings = cast(Any, request.args)
            chosen: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
            until = handle_stop_sequences(chosen.pop("until"), eos=end)
            new_tokens = int(chosen.pop("max_gen_toks"))
            if new_tokens >= self.max_length:
                fix = "Lower it, or ask a model of more positions."
                raise ConfigError(
                    f"max_gen_toks of {request.task_name}", f"must be below {self.max_length}", got=new_tokens, fix=fix
                )
            sampling = _sampling(chosen, tuple(filter(None, until)), new_tokens, number, str(request.task_name))
            ids = self.tok_encode(context)[-(self.max_length - new_tokens) :]
            questions.append(Question(tuple(ids), (), self._adapter, sampling))
            stops.append(until)
        answers = self._answered(questions)
        return [self._text(one.ids, until) for one, until in zip(answers, stops, strict=True)]

    def _text(self, ids: Sequence[int], until: list[str]) -> str:
        """The text of an answer, decoded like the `hf` class: without special tokens, and cut at the stop strings."""
        special = {self.tokenizer.convert_tokens_to_ids(stop) for stop in until if stop in self.tokenizer.all_special_tokens}
        ends = [place for place, token in enumerate(ids) if token in special]
        text = self.tokenizer.decode(list(ids[: ends[0]] if ends else ids), skip_special_tokens=True)
        return postprocess_generated_text(text, until, None)

    def _answered(self, questions: Sequence[Question]) -> list[Answered]:
        """The answers, in the order of the questions. They are computed sorted by their tokens, so that questions with common
        beginnings follow each other and share their computation."""
        order = sorted(range(len(questions)), key=lambda number: questions[number].prompt_ids)
        found: dict[int, Answered] = {}
        answers = chain.from_iterable(self._answer(in_blocks(questions[number] for number in order)))
        for number, one in zip(order, answers, strict=True):
            assert one.refused is None, one.refused
            found[number] = one
            self._count(number)
        return [found[number] for number in range(len(questions))]

    def _count(self, number: int) -> None:
        if (doc := self._docs[number]) not in self._docs_answered:
            self._docs_answered.add(doc)
            self._progress(1)


def _doc(request: Instance) -> tuple[str | None, int]:
    return request.task_name, request.doc_id or 0


def _sampling(chosen: Mapping[str, Any], stop: tuple[str, ...], max_new_tokens: int, seed: int, task: str) -> Sampling:
    """chosen: the task's generation options other than stop strings. Raises ConfigError for an unsupported option."""
    for name, value in chosen.items():
        if name not in SAMPLED_BY and value not in MEANINGLESS.get(name, ()):
            rule = f"is not supported; supported are {', '.join(sorted(SAMPLED_BY))}"
            raise ConfigError(f"generation_kwargs.{name} of {task}", rule, got=value)
    sampled = {name: chosen[name] for name in SAMPLED_BY if chosen.get(name) is not None}
    if not chosen.get("do_sample"):
        sampled = {name: value for name, value in sampled.items() if name == "repetition_penalty"}
    return Sampling(max_new_tokens=max_new_tokens, stop=stop, seed=seed, **sampled)
