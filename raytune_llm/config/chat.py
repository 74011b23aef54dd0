from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from raytune_llm.config.section import Fraction, PositiveInt, section
from raytune_llm.config.serve import ServedModels
from raytune_llm.errors import ConfigError


@section
class ChatConfig(ServedModels):
    """A conversation in the terminal, with a model and adapters of this process or with a server."""

    setting: ClassVar[str] = "chat.adapters"

    url: str | None
    """The address of a server with the OpenAI API, such as http://127.0.0.1:8000; null: the model is loaded here."""
    api_key: str | None
    """The server's API key. null: the environment's RAYTUNE_LLM_API_KEY."""
    adapter: str | None
    """The adapter that answers first: a name of `adapters`, a folder (it is called by its run's name), or a model of the
    server's. null: the base."""
    system: str | None
    temperature: Annotated[float, Field(ge=0, le=2)] | None
    """null, here and below: the server's own."""
    top_p: Fraction | None
    max_tokens: PositiveInt | None
    """The longest answer, in tokens. null: what is left of the context."""
    seed: int | None
    thinking: bool | None
    """Whether thoughts come before an answer, for templates that ask. null: as the template has it."""

    def __post_init__(self) -> None:
        if self.url is None:
            return
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError("chat.url", "must begin with http:// or https://", got=self.url)
        if self.adapters:
            fix = "Give them to the server (serve.adapters), and name one with chat.adapter."
            raise ConfigError(
                "chat.adapters", "can't be combined with chat.url: a server has its own", got=self.adapters, fix=fix
            )
