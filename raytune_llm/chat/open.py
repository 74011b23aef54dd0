"""Opens the conversation that `chat`'s settings describe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raytune_llm.chat.client import Client
from raytune_llm.chat.dialogue import SETTINGS, Dialogue
from raytune_llm.config.paths import expanded
from raytune_llm.config.run import API_KEY, ChatRun
from raytune_llm.errors import ConfigError, ResourceError


@contextmanager
def open_dialogue(run: ChatRun) -> Iterator[Dialogue]:
    """A dialogue with a server (chat.url) or with a model in this process. Raises ConfigError or ResourceError."""
    run = _with_adapter(run)
    chat = run.chat
    with _client(run) as client:
        models = client.models()
        if not models:
            raise ResourceError(f"the server at {chat.url} has no model")
        settings = {name: value for name in SETTINGS if (value := getattr(chat, name, None)) is not None}
        dialogue = Dialogue(client, models, models[0].id, system=chat.system, settings=settings, thinking=chat.thinking)
        if chat.adapter is not None:
            try:
                dialogue.use(chat.adapter)
            except ConfigError as error:
                raise ConfigError("chat.adapter", error.rule, got=chat.adapter, fix=error.fix) from None
        yield dialogue


def adapter_name(folder: Path) -> str:
    """The name of an adapter's folder, or of the run if the folder is its final/."""
    folder = folder.absolute()
    return folder.parent.name if folder.name == "final" else folder.name


@contextmanager
def _client(run: ChatRun) -> Iterator[Client]:
    if run.chat.url is None:
        from raytune_llm.serve.extra import check_extra

        check_extra("chat without chat.url")
        from raytune_llm.chat.here import client_here  # a server's client needs neither torch nor a web server

        with client_here(run) as client:
            yield client
        return
    client = Client.at(run.chat.url, run.chat.api_key or os.environ.get(API_KEY))
    try:
        yield client
    finally:
        client.close()


def _with_adapter(run: ChatRun) -> ChatRun:
    """A run whose chat.adapter is a name: a folder is entered in chat.adapters."""
    chat = run.chat
    if chat.url is not None or chat.adapter is None or chat.adapter in (*chat.adapters, "none"):
        return run
    folder = expanded(chat.adapter)
    if not folder.is_dir():
        rule = f"must be a folder, none, or one of chat.adapters ({', '.join(chat.adapters) or 'none is given'})"
        raise ConfigError("chat.adapter", rule, got=chat.adapter)
    name = adapter_name(folder)
    return replace(run, chat=replace(chat, adapter=name, adapters={**chat.adapters, name: str(folder)}))
