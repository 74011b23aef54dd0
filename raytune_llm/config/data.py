from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError


class RowFormat:
    """What the rules between sections ask of any format."""

    @property
    def pair_margin(self) -> str | None:
        """The column that says by how much the chosen answer of a pair is better, where rows can have one."""
        return None


@section
class Columns(RowFormat):
    """Columns that rows of messages can have, whatever their form. A column that is null, or that a row lacks, is not there.

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

    @property
    def pair_margin(self) -> str | None:
        return self.margin


@section
class ChatFormat(Columns):
    """Rows with a list of {role, content} messages. Where `messages` is null, each side of a pair is a whole conversation."""

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
    """Rows with a list of messages whose keys and roles have names of their own. A role without a name does not occur."""

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
    """Requests or tool results in turn with answers or tool calls; a call is a message that holds JSON."""

    name: Literal["sharegpt"]


@section
class OpenAIFormat(Tags):
    """The same with calls as `tool_calls` of an answer, and several tool results in a row."""

    name: Literal["openai"]


@section
class PromptCompletionFormat(Columns):
    """Rows with a request and the answer to it, each a text or a list of {role, content} messages."""

    name: Literal["prompt_completion"]
    prompt: str
    completion: str | None


@section
class TextFormat(RowFormat):
    """Rows with one text each, for pre-training."""

    name: Literal["text"]
    text: str


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
    """Also a part of it, as train[:1000] or train[10%:20%]. Of a folder: by its files' names, as on the Hugging Face hub."""
    eval_path: str | dict[str, str] | None
    """Data of the same format to evaluate on; several as {name: path}."""
    eval_split: str | None
    """Of eval_path, or where that is null of path; null: split, of eval_path."""
    eval_names: list[str]
    """Entries of dataset_info to evaluate on."""
    eval_fraction: Fraction | dict[str, Fraction]
    """Part of the rows of each source that is held out, chosen by train.seed; several as {name: part}, where an entry of names
    that is not there keeps its rows. 0 without eval_path and eval_names trains without evaluation."""
    eval_rows: PositiveInt | None
    """So many rows are held out instead, of several sources in proportion to their rows."""
    format: FormatConfig
    dataset_info: str | None
    """A LLaMA-Factory dataset_info.json, or its folder: its entries take the place of path, subset, split and format."""
    names: list[str]
    """Entries of dataset_info, one after another."""
    mix: Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
    """How several data sets make an epoch: each row once; or drawn in turn, until the first is exhausted, until all are (with
    repeats), or until all are (without)."""
    mix_weights: list[PositiveFloat] | None
    """The share of each of names in what is drawn; null: they take turns."""
    mix_temperature: PositiveFloat | None
    """Shares by size instead: 1 proportional to rows, the higher the more even."""
    mix_epochs: list[PositiveFloat] | None
    """How often each of names goes into one epoch, before they are mixed: 2 is every row twice, 0.5 half of the rows, drawn by
    train.seed; null: once."""
    media_dir: str | None
    """Where images, videos and audios lie; null: beside the data."""
    num_samples: PositiveInt | None
    """So many rows drawn at random, by their content alone; more than there are repeats rows."""
    max_samples: PositiveInt | None
    """The first so many rows."""
    streaming: bool
    """Train while rows are still being tokenized. The order is then that of the data, shuffled within a buffer."""
    streaming_buffer_rows: PositiveInt
    """Rows of a stream that are shuffled and packed together; training starts when so many are there."""
    max_length: PositiveInt
    """Tokens of a row and of a pack; of each side of a pair."""
    overlong: Literal["truncate", "llamafactory", "drop", "error"]
    """Of rows with more tokens: truncate: whole turns go, then the longest texts lose their ends, and the template's own tokens
    stay; llamafactory: tokens are cut by that program's rule; drop: they are left out, which is not counted as a fault."""
    template: str | None
    """A named chat template; null: the tokenizer's own, or where it has none, the one that goes with the model's name."""
    default_system: str | None
    """The system text of conversations without one; null: the template's."""
    tool_format: str | None
    """How tools are declared and called, other than in the named template's own way."""
    today: str | None
    """The day that llama3 takes for today where it has tools, as 31 Jan 2025; null: a fixed one."""
    enable_thinking: bool | None
    """How a template that reasons treats answers without a thought: true: it learns to say an empty one; false: the empty
    one is asked for, and thoughts that are there are left out; null: as each answer has it."""
    reasoning: Literal["keep", "drop"]
    """Thoughts of answers, kept apart or between <think> marks: keep them (a template that can't say them is refused) or leave
    them out."""
    preserve_thinking: bool
    """Thoughts of earlier answers stay also where these are not trained."""
    mask_history: bool
    """Only the last answer is trained."""
    train_on_prompt: bool
    """Requests are trained too."""
    packing: bool
    share_prompts: Literal["auto"] | bool
    """The two answers of a pair share one computation of their request; auto: where model.attention allows it and every layer of
    the model attends to all earlier tokens."""
    max_bad_fraction: Fraction
    """More unusable rows than this part of all stop the run."""
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
        _is_a_pair_or_has_a_verdict(self.format)
        if self.tool_format is not None and self.template is None:
            raise ConfigError(
                "data.tool_format", "needs data.template: a tokenizer's own template has its own format", got=self.tool_format
            )

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        fractions = self.eval_fraction.values() if isinstance(self.eval_fraction, dict) else [self.eval_fraction]
        return bool(self.eval_path or self.eval_split or self.eval_names or self.eval_rows or any(fractions))

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


def _is_a_pair_or_has_a_verdict(format: RowFormat) -> None:
    if not isinstance(format, Columns):
        return
    if (format.chosen is None) != (format.rejected is None):
        one, other = ("chosen", "rejected") if format.rejected is None else ("rejected", "chosen")
        raise ConfigError(f"data.format.{other}", f"must be given if data.format.{one} is", fix="Both make a pair.")
    if format.chosen is not None and format.label is not None:
        rule = "must be null if data.format.chosen is given: a row is a pair or has a verdict"
        raise ConfigError("data.format.label", rule, got=format.label, fix="Choose one of the two.")


def _below_one(setting: str, fraction: float) -> None:
    if fraction == 1:
        raise ConfigError(setting, "must be at least 0 and below 1", got=fraction, fix="For example, 0.1.")
