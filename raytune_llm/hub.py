"""Asks whether the hub of models and data sets answers, within seconds: its own libraries would try for most of a minute."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import Literal

HubState = Literal["reached", "not reached", "offline"]
TIMEOUT_S = 5.0


def ask_hub() -> tuple[str, HubState]:
    """The hub's address (HF_ENDPOINT), and whether it answers. It is not asked, and counts as offline, if HF_HUB_OFFLINE is
    set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return constants.ENDPOINT, "offline"
    return constants.ENDPOINT, "reached" if answers(constants.ENDPOINT) else "not reached"


def answers(url: str) -> bool:
    """Whether the address answers within TIMEOUT_S, through the environment's proxy if there is one."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an error status is an answer too
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, since looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answered.is_set()


def hub_failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises if the hub or the network fails. That includes errors of its HTTP library (httpx, or httpx2 in
    later versions) and RuntimeError from hf_xet, which transfers large files."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return (HTTPError, OSError, ValueError, RuntimeError)
