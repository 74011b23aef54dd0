from __future__ import annotations

import socket
import sys

import pytest

from raytune_llm.errors import ResourceError
from raytune_llm.serve.port import bound, kept_for_ray, url_of


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")])
def test_an_address_is_written_as_clients_take_it(host: str, url: str):
    assert url_of(host, 80) == url


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "256.256.256.256"])
def test_a_host_that_is_none_is_refused(host: str):
    with pytest.raises(ResourceError, match=f"serve.host={host}"):
        bound(host, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is only looked at")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_kept_for_ray_serve_is_opened_by_it_and_by_nobody_else(host: str):
    with kept_for_ray(host, 0) as port:
        with pytest.raises(ResourceError, match=f"serve.port={port} can't be opened"):
            bound(host, port)
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind((host, port))
            proxy.listen()
            for _ in range(20):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                proxy.accept()[0].close()
    bound(host, port).close()
