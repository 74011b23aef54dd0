from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError


class RowFormat:
    """The properties of a format that rules between sections read."""

    @property
    def pair_margin(self) -> str | None:
        """The column with the margin of a pair; None if the format has none."""
        return None

    @property
    def row_kind(self) -> str:
        """The kind of row that this format gives: one of data.kinds.KINDS."""
        return "conversations"


@section
class Columns(RowFormat):
    """The columns that all formats with messages may have. A column is skipped if its name is null or if a row lacks it.

    Rows with `chosen` and `rejected` are pairs; rows with a true or false `label` are labelled answers. `margin` is a number of
    at least 0: by how much the chosen answer is better.
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
    """Rows with an instruction, an optional input that is appended on a new line, and the output to learn."""

    name: Literal["alpaca"]
    instruction: str
    input: str | None
    output: str | None
    system: str | None
    history: str | None


@section
class Tags(Columns):
    """Rows with a list of messages whose keys and role names can be set. A role whose name is null does not occur."""

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
    """User messages or tool results alternate with answers or tool calls. A tool call is a message whose text is JSON."""

    name: Literal["sharegpt"]


@section
class OpenAIFormat(Tags):
    """Messages in OpenAI's form: an answer may have `tool_calls`, and several tool results may follow each other."""

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
    """A file, a folder of files of one type, either of these in an object store (s3://, gs://, ...), or the id of a hub data
    set."""
    hub: Literal["huggingface", "modelscope"]
    subset: str | None
    split: str
    """A split, or a slice of one: train[:1000], train[10%:20%]. In a folder, file names tell the splits, as on the Hugging Face
    hub."""
    eval_path: str | dict[str, str] | None
    """Data in the same format to evaluate on; several as {name: path}."""
    eval_split: str | None
    """The split of eval_path to evaluate on, or of path if eval_path is null. null: eval_path's split of the name `split`."""
    eval_names: list[str]
    """Entries of dataset_info to evaluate on."""
    eval_fraction: Fraction | dict[str, Fraction]
    """Fraction of each source's rows to hold out for evaluation, chosen with train.seed. {name: fraction} holds out rows of these
    sources only. With 0, and without eval_path and eval_names, there is no evaluation."""
    eval_rows: PositiveInt | None
    """Number of rows to hold out, instead of a fraction. Several sources contribute in proportion to their rows."""
    format: FormatConfig
    dataset_info: str | None
    """LLaMA-Factory's dataset_info.json, or its folder. Its entries replace path, subset, split and format."""
    names: list[str]
    """The entries of dataset_info to train on."""
    mix: Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
    """How an epoch is made of several data sets. concat: one after another. The others interleave them: interleave_under until
    the first is exhausted, interleave_over until all are, with repeats, and interleave_once until all are, without repeats."""
    mix_weights: list[PositiveFloat] | None
    """The sampling probability of each of `names`; null: equal."""
    mix_temperature: PositiveFloat | None
    """Sampling probabilities by size instead: 1 is proportional to the number of rows, a higher value is more even."""
    mix_epochs: list[PositiveFloat] | None
    """How often each of `names` occurs in one epoch: 2 takes every row twice, 0.5 takes half of the rows, drawn with train.seed.
    null: once each."""
    media_dir: str | None
    """The folder that paths of images, videos and audio files are relative to; null: the folder of the data."""
    num_samples: PositiveInt | None
    """Number of rows to sample, chosen by a hash of their content. If there are fewer rows, some are repeated."""
    max_samples: PositiveInt | None
    """Use only the first N rows."""
    streaming: bool
    """Train while rows are still being tokenized. Rows then keep the order of the data, except for shuffling within a buffer."""
    streaming_buffer_rows: PositiveInt
    """Rows of a stream that are shuffled and packed together. Training starts when this many are tokenized."""
    max_length: PositiveInt
    """Maximum tokens of a row, of a pack, and of each side of a pair."""
    overlong: Literal["truncate", "llamafactory", "drop", "error"]
    """What happens to longer rows. truncate: remove whole turns, then shorten the longest texts at their ends; special tokens are
    kept. llamafactory: cut tokens by LLaMA-Factory's rule. drop: leave the rows out, without counting them as bad. error: the
    first such row stops the run."""
    template: str | None
    """A named chat template. null: the tokenizer's own, or if it has none, the template that fits the model's name."""
    default_system: str | None
    """The system message of conversations without one; null: the template's default."""
    tool_format: str | None
    """The format in which tools are declared and called; null: the template's own."""
    today: str | None
    """The date that the template llama3 writes when there are tools, such as 31 Jan 2025; null: a fixed date."""
    enable_thinking: bool | None
    """How a reasoning template treats answers without reasoning. true: an empty reasoning block is trained. false: an empty
    block belongs to the prompt, and reasoning that rows have is left out. null: each answer stays as it is."""
    reasoning: Literal["keep", "drop"]
    """Whether to keep the reasoning of answers (a field of its own, or text between <think> tags). A template that can't express
    reasoning is refused if it is kept."""
    preserve_thinking: bool
    """Keep the reasoning of earlier answers even if they are not trained."""
    mask_history: bool
    """Train on the last answer only; earlier answers are masked."""
    train_on_prompt: bool
    """Train on prompts too."""
    packing: bool
    share_prompts: Literal["auto"] | bool
    """Compute the prompt of a pair once for both of its answers. auto: if model.attention supports it and every layer of the
    model attends to all earlier tokens."""
    max_bad_fraction: Fraction
    """The run stops if a larger fraction of the rows is unusable."""
    cache: str
    """The folder of the token stores."""

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
        """Whether held-out rows can come from several sources, so that metrics carry the source's name."""
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
