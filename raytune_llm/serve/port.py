"""Opens the port of a server before the model is loaded, so that a port in use is reported at once."""

from __future__ import annotations

import socket

from raytune_llm.errors import ResourceError


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one. Raises ResourceError if the port can't be opened."""
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
    listening.listen(512)
    return listening


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
