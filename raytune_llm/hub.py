"""Whether the hub of models and data sets answers. Its libraries would try for most of a minute."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import Literal

HubState = Literal["reached", "not reached", "offline"]
TIMEOUT_S = 5.0


def ask_hub() -> tuple[str, HubState]:
    """The hub's address (HF_ENDPOINT), and whether it answers; offline where HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return constants.ENDPOINT, "offline"
    return constants.ENDPOINT, "reached" if answers(constants.ENDPOINT) else "not reached"


def answers(url: str) -> bool:
    """Whether anything answers in time, through a proxy where there is one."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, since looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answered.is_set()


def hub_failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub or the way to it is at fault: also the errors of its HTTP library (httpx, or
    httpx2 in later versions), and RuntimeError of hf_xet, which carries large files."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return (HTTPError, OSError, ValueError, RuntimeError)
