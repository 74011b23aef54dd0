from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveInt, section


@section
class ChatFormat:
    """Rows with a list of {role, content} messages."""

    name: Literal["chat"]
    messages: str
    tools: str | None


@section
class AlpacaFormat:
    """Rows with an instruction, an optional input that goes on a new line after it, and the output to learn."""

    name: Literal["alpaca"]
    instruction: str
    input: str | None
    output: str
    system: str | None
    history: str | None


FormatConfig = Annotated[ChatFormat | AlpacaFormat, Field(discriminator="name")]


@section
class DataConfig:
    path: str | None
    """A file, a folder of files of one type, or a hub data set id."""
    subset: str | None
    split: str
    eval_path: str | None
    eval_fraction: Fraction
    """Part of the rows that is held out, chosen by train.seed; 0 with no eval_path trains without evaluation."""
    format: FormatConfig
    max_samples: PositiveInt | None
    max_length: PositiveInt
    """Tokens of a row and of a pack."""
    overlong: Literal["truncate", "drop", "error"]
    packing: bool
    max_bad_fraction: Fraction
    """More unusable rows than this part of all stop the run."""
    cache: str
    """Folder of the token stores."""
