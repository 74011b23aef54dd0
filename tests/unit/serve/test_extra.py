from __future__ import annotations

import io
import sys

import pytest

from raytune_llm.__main__ import main


@pytest.mark.parametrize(("words", "what"), [(["serve", "resources=inline"], "serve"), (["chat"], "chat without chat.url")])
def test_an_installation_without_the_servers_packages_says_what_to_install(words, what, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as where it is not installed
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert main([*words, "model=smollm2_135m"]) != 0
    assert f"error: {what} needs uvicorn" in (said := capsys.readouterr().err)
    assert "pip install 'raytune-llm[serve]'" in said
