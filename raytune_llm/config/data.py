from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError


class RowFormat:
    """What rules between sections read of any format."""

    @property
    def pair_margin(self) -> str | None:
        """The column with a pair's margin; None if the format has none."""
        return None

    @property
    def row_kind(self) -> str:
        """What a data set of this format holds: one of data.kinds.KINDS."""
        return "conversations"


@section
class Columns(RowFormat):
    """Columns of all formats with messages. A column that is null, or that a row lacks, is skipped.

    Rows with `chosen` and `rejected` are pairs, rows with a true or false `label` are labelled answers. `margin` is a number that
    is not negative: by how much the chosen answer is better.
    """

    tools: str | None
    chosen: str | None
    rejected: str | None
    margin: str | None
    label: str | None
    images: str | None
    videos: str | None
    audios: str | None

    def __post_init__(self) -> None:
        if (self.chosen is None) != (self.rejected is None):
            one, other = ("chosen", "rejected") if self.rejected is None else ("rejected", "chosen")
            raise ConfigError(f"data.format.{other}", f"must be given if data.format.{one} is", fix="Both make a pair.")
        if self.chosen is not None and self.label is not None:
            rule = "must be null if data.format.chosen is given: a row is a pair or has a verdict"
            raise ConfigError("data.format.label", rule, got=self.label, fix="Choose one of the two.")

    @property
    def pair_margin(self) -> str | None:
        return self.margin

    @property
    def row_kind(self) -> str:
        if self.label is not None:
            return "labeled"
        return "conversations" if self.chosen is None else "pairs"


@section
class ChatFormat(Columns):
    """Rows with a list of {role, content} messages. If `messages` is null, each side of a pair is a whole conversation."""

    name: Literal["chat"]
    messages: str | None


@section
class AlpacaFormat(Columns):
    """Rows with an instruction, an optional input that follows on a new line, and the output to learn."""

    name: Literal["alpaca"]
    instruction: str
    input: str | None
    output: str | None
    system: str | None
    history: str | None


@section
class Tags(Columns):
    """Rows with a list of messages with configurable keys and role names. A role whose name is null does not occur."""

    messages: str
    system: str | None
    role_tag: str
    content_tag: str
    user_tag: str | None
    assistant_tag: str | None
    observation_tag: str | None
    function_tag: str | None
    system_tag: str | None


@section
class ShareGPTFormat(Tags):
    """User messages or tool results alternate with answers or tool calls; a call is a message that holds JSON."""

    name: Literal["sharegpt"]


@section
class OpenAIFormat(Tags):
    """Messages with calls as `tool_calls` of an answer, and several tool results in a row."""

    name: Literal["openai"]


@section
class PromptCompletionFormat(Columns):
    """Rows with a prompt and its completion, each a text or a list of {role, content} messages."""

    name: Literal["prompt_completion"]
    prompt: str
    completion: str | None


@section
class TextFormat(RowFormat):
    """Rows with one text each, for pre-training."""

    name: Literal["text"]
    text: str

    @property
    def row_kind(self) -> str:
        return "text"


FormatConfig = Annotated[
    ChatFormat | AlpacaFormat | ShareGPTFormat | OpenAIFormat | PromptCompletionFormat | TextFormat, Field(discriminator="name")
]


@section
class DataConfig:
    path: str | None
    """A file or a folder of files of one type, here or by address (s3://, gs://, ...), or a hub data set id."""
    hub: Literal["huggingface", "modelscope"]
    subset: str | None
    split: str
    """A split or a part of it: train[:1000], train[10%:20%]. In a folder, file names decide, as on the Hugging Face hub."""
    eval_path: str | dict[str, str] | None
    """Data of the same format to evaluate on; several as {name: path}."""
    eval_split: str | None
    """The split of eval_path, or of path if eval_path is null. null: `split`, of eval_path."""
    eval_names: list[str]
    """Entries of dataset_info to evaluate on."""
    eval_fraction: Fraction | dict[str, Fraction]
    """Fraction of each source's rows that is held out, chosen by train.seed; several as {name: fraction}, where an absent entry
    of names keeps its rows. 0 without eval_path and eval_names trains without evaluation."""
    eval_rows: PositiveInt | None
    """Number of rows that are held out instead; several sources contribute in proportion to their rows."""
    format: FormatConfig
    dataset_info: str | None
    """A LLaMA-Factory dataset_info.json, or its folder: its entries replace path, subset, split and format."""
    names: list[str]
    """Entries of dataset_info, one after another."""
    mix: Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
    """How several data sets make an epoch: concatenated; or interleaved until the first is exhausted, until all are (with
    repeats), or until all are (without repeats)."""
    mix_weights: list[PositiveFloat] | None
    """The probability of each of names; null: equal."""
    mix_temperature: PositiveFloat | None
    """Probabilities by size instead: 1 is proportional to rows, higher is more even."""
    mix_epochs: list[PositiveFloat] | None
    """How often each of names is in one epoch, before they are mixed: 2 is every row twice, 0.5 half of the rows, drawn by
    train.seed; null: once."""
    media_dir: str | None
    """The folder of images, videos and audios; null: the folder of the data."""
    num_samples: PositiveInt | None
    """Number of rows to sample, by a hash of their content; more than there are repeats rows."""
    max_samples: PositiveInt | None
    """Use only the first N rows."""
    streaming: bool
    """Train while rows are still being tokenized. The order is then that of the data, shuffled within a buffer."""
    streaming_buffer_rows: PositiveInt
    """Rows of a stream that are shuffled and packed together; training starts when this many are tokenized."""
    max_length: PositiveInt
    """Maximum tokens of a row, of a pack, and of each side of a pair."""
    overlong: Literal["truncate", "llamafactory", "drop", "error"]
    """What happens to longer rows. truncate: whole turns are removed, then the longest texts lose their ends; special tokens
    stay. llamafactory: tokens are cut by LLaMA-Factory's rule. drop: rows are left out, and do not count as bad."""
    template: str | None
    """A named chat template; null: the tokenizer's own, or if it has none, the one for the model's name."""
    default_system: str | None
    """The system message of conversations without one; null: the template's default."""
    tool_format: str | None
    """The format of tool declarations and calls; null: the template's own."""
    today: str | None
    """The date that the template llama3 writes with tools, as 31 Jan 2025; null: a fixed one."""
    enable_thinking: bool | None
    """How a reasoning template treats answers without reasoning. true: an empty block is trained. false: an empty
    block is part of the prompt, and existing reasoning is left out. null: each answer stays as it is."""
    reasoning: Literal["keep", "drop"]
    """Reasoning of answers, in its own field or between <think> tags: keep it (a template that can't express it is refused) or
    drop it."""
    preserve_thinking: bool
    """Reasoning of earlier answers is kept even if these are not trained."""
    mask_history: bool
    """Mask all answers but the last."""
    train_on_prompt: bool
    """Train on prompts too."""
    packing: bool
    share_prompts: Literal["auto"] | bool
    """The two answers of a pair share one computation of their prompt. auto: if model.attention supports it and every layer of
    the model attends to all earlier tokens."""
    max_bad_fraction: Fraction
    """A larger fraction of unusable rows stops the run."""
    cache: str
    """Folder of the token stores."""

    def __post_init__(self) -> None:
        if self.mask_history and self.train_on_prompt:
            raise ConfigError("data.mask_history", "must be false if data.train_on_prompt is true", got=True, fix="Choose one.")
        if bool(self.names) != (self.dataset_info is not None):
            raise ConfigError(
                "data.names",
                "must name entries of data.dataset_info, and needs it",
                got=self.names,
                fix="For example, data.dataset_info=data/dataset_info.json data.names=[identity].",
            )
        if self.dataset_info is not None and self.path is not None:
            raise ConfigError("data.path", "must be null if data.dataset_info is given", got=self.path, fix="Choose one.")
        shares = {"data.mix_weights": self.mix_weights, "data.mix_temperature": self.mix_temperature}
        for setting, value in shares.items():
            if value is not None and self.mix == "concat":
                raise ConfigError(setting, "must be null if data.mix=concat", got=value, fix="Set data.mix=interleave_over.")
        if self.mix != "concat" and len(self.names) < 2:
            raise ConfigError("data.mix", "needs several data.names", got=self.mix, fix="Set data.mix=concat.")
        if None not in shares.values():
            raise ConfigError("data.mix_temperature", "must be null if data.mix_weights is given", got=self.mix_temperature)
        for setting, values in (("data.mix_weights", self.mix_weights), ("data.mix_epochs", self.mix_epochs)):
            if values is not None and len(values) != len(self.names):
                raise ConfigError(setting, f"must be {len(self.names)} numbers, as data.names", got=values)
        self._held_out_rows_are_said_once()
        if self.tool_format is not None and self.template is None:
            raise ConfigError(
                "data.tool_format", "needs data.template: a tokenizer's own template has its own format", got=self.tool_format
            )

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        fractions = self.eval_fraction.values() if isinstance(self.eval_fraction, dict) else [self.eval_fraction]
        return bool(self.eval_path or self.eval_split or self.eval_names or self.eval_rows or any(fractions))

    @property
    def names_held_out(self) -> bool:
        """Whether held-out rows can have several sources, whose figures have their names."""
        return isinstance(self.eval_path, dict) or len(self.eval_names) > 1 or len(self.names) > 1

    def _held_out_rows_are_said_once(self) -> None:
        given = {
            "data.eval_path": self.eval_path or self.eval_split,
            "data.eval_names": self.eval_names,
            "data.eval_fraction": self.eval_fraction,
            "data.eval_rows": self.eval_rows,
        }
        if self.eval_path is None and self.eval_split is not None:
            given["data.eval_split"] = given.pop("data.eval_path")
            if self.dataset_info is not None:
                raise ConfigError(
                    "data.eval_split", "can't be combined with data.dataset_info: its entries have a split", got=self.eval_split,
                    fix="Set data.eval_names.",
                )  # fmt: skip
        several = [setting for setting, value in given.items() if value]
        if len(several) > 1:
            raise ConfigError(several[1], f"can't be combined with {several[0]}", got=given[several[1]], fix="Choose one.")
        if self.eval_names and self.dataset_info is None:
            raise ConfigError("data.eval_names", "needs data.dataset_info", got=self.eval_names, fix="Or set data.eval_path.")
        if isinstance(self.eval_fraction, dict):
            for name, fraction in self.eval_fraction.items():
                if name not in self.names:
                    raise ConfigError(f"data.eval_fraction.{name}", "must be one of data.names", got=fraction)
                _below_one(f"data.eval_fraction.{name}", fraction)
        else:
            _below_one("data.eval_fraction", self.eval_fraction)


def _below_one(setting: str, fraction: float) -> None:
    if fraction == 1:
        raise ConfigError(setting, "must be at least 0 and below 1", got=fraction, fix="For example, 0.1.")
