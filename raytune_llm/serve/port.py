"""Opens the port of a server before the model is loaded, so that a port in use is reported at once."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from raytune_llm.errors import ResourceError


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one. Raises ResourceError if the port can't be opened."""
    listening = _bound(host, port)
    listening.listen(512)
    return listening


@contextmanager
def kept_for_ray(host: str, port: int) -> Iterator[int]:
    """The port, or a free one for 0, which only Ray Serve can open inside the block. Raises ResourceError like `bound`.

    Ray Serve's proxies open it with SO_REUSEPORT, which two sockets of one user may share if both have it. A socket that does not
    listen gets no connections.
    """
    with closing(_bound(host, port)) as keeper:
        if sys.platform == "linux" and os.environ.get("SERVE_SOCKET_REUSE_PORT_ENABLED", "1") == "1":
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            yield keeper.getsockname()[1]
            return
        port = keeper.getsockname()[1]
    yield port


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:  # the second one of what can be no host's name
        listening.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(
            f"serve.host={host} serve.port={port} can't be opened ({why})",
            "Choose another port, or 0 for a free one.",
        ) from None
    return listening


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
