"""The request bodies of the API, as pydantic models.

Fields that OpenAI's API doesn't have are vLLM's, under vLLM's names. A field in IGNORED has no effect here and is listed in the
response header `x-ignored-fields`; any other unknown field is rejected, and so is a value of another type: a number in a string.
Fields of type None are OpenAI's for what this server can't do: a null asks for nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

MAX_MESSAGES = 1024
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
MAX_ANSWERS = 256
"""Of a request: prompts times n. More would never find room beside those of others."""
MAX_INPUTS = 256
MAX_DECODED_TOKENS = 262_144

IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "verbosity",
    "add_generation_prompt",
    "lora_int_id",
}
"""Fields that are accepted and have no effect."""


class Part(BaseModel):
    """The base of all objects in requests."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Body(Part):
    """The base of request bodies. `ignored`: names of given fields that have no effect."""

    ignored: SkipJsonSchema[list[str]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "ignored" in values:
            raise ValueError("unknown field: ignored")
        known = set(cls.model_fields)
        ignored = [name for name in values if name in IGNORED and name not in known]
        return {name: value for name, value in values.items() if name not in ignored} | {"ignored": sorted(ignored)}


class RequestBody(Body):
    """The base of requests to a model."""

    model: str = Field(min_length=1, max_length=512)


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted, but chunks are never padded."""
    continuous_usage_stats: bool | None = None
    """vLLM's; accepted, but only the last chunk has the usage."""


class JSONSchema(Part):
    name: str = Field(max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None
    """A schema with keywords that can't be enforced is refused. Otherwise they are listed as ignored."""


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and with no other")
        return self


class StructuredOutputs(Part):
    """vLLM's structured_outputs, of which exactly one field must be given."""

    json_: dict[str, Any] | str | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1024)
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("exactly one of json, regex, choice and grammar must be given")
        return self


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=str | list[str]),
]
"""One string, or several."""


class GenerationBody(RequestBody):
    """The fields that chat and plain completions share."""

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _options_have_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may be given with stream=true only")
        for name in ("include_obfuscation", "continuous_usage_stats"):
            if getattr(self.stream_options, name, None):
                self.ignored = sorted([*self.ignored, f"stream_options.{name}"])
        return self


class FunctionDeclaration(Part):
    name: str = Field(pattern=r"^[\w.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments are of `parameters`, also where the model may answer with text, and keywords that can't be enforced are refused.
    Arguments of a call that is required are of `parameters` in any case."""


class Tool(Part):
    type: Literal["function"]
    function: FunctionDeclaration


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Part):
    name: str
    arguments: str


class Called(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Part):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(max_length=256)]


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[Called] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} must have content")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=32)
    parallel_tool_calls: bool | None = None
    """False: calls after an answer's first one are left out."""
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1)
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens can't both be given")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise ValueError("tool_choice must name one of the tools")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs can't both be given")
        return self

    @property
    def tool_names(self) -> set[str]:
        return {tool.function.name for tool in self.tools or ()}


Prompt = str | list[int] | list[str] | list[list[int]]


class CompletionRequest(GenerationBody):
    prompt: Prompt
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _has_prompts(self) -> CompletionRequest:
        prompts = self.prompts
        if not prompts or len(prompts) > MAX_PROMPTS or not all(prompts):
            raise ValueError(f"prompt must hold 1 to {MAX_PROMPTS} prompts, none of them empty")
        if len(prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ValueError(f"prompt and n must ask for at most {MAX_ANSWERS} answers")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must be n, since all answers are returned")
        return self


class EmbeddingRequest(RequestBody):
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["mean", "last"] = "mean"

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _has_inputs(self) -> EmbeddingRequest:
        inputs = self.inputs
        if not inputs or len(inputs) > MAX_INPUTS or not all(inputs):
            raise ValueError(f"input must hold 1 to {MAX_INPUTS} texts, none of them empty")
        return self


class ScoreRequest(RequestBody):
    """A request to a reward model: texts, or one conversation that ends with the answer to score."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> ScoreRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("exactly one of input and messages must be given")
        return self


class TokenizeRequest(RequestBody):
    """vLLM's /tokenize: a text, or messages that are rendered with the chat template."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True
    """The rendered text ends where an answer would begin."""
    add_special_tokens: bool | None = None
    """The token that begins plain texts is put before the text. Default: before a `prompt`, as in completions."""
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=32)

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages must be given")
        if self.messages is None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs need messages")
        return self


class DetokenizeRequest(RequestBody):
    tokens: list[int] = Field(max_length=MAX_DECODED_TOKENS)


class LoadAdapter(Body):
    """vLLM's /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False
    """Adapters whose experts are in one tensor are not read."""
    pinned: bool = False


class UnloadAdapter(Body):
    lora_name: str


class PinAdapter(Part):
    pinned: bool


def is_number(text: str) -> bool:
    """It is a natural number in ASCII digits, not so long that Python refuses to read it."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None
