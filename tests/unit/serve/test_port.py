from __future__ import annotations

import pytest

from raytune_llm.errors import ResourceError
from raytune_llm.serve.port import bound, url_of


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")])
def test_an_address_is_written_as_clients_take_it(host: str, url: str):
    assert url_of(host, 80) == url


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "256.256.256.256"])
def test_a_host_that_is_none_is_refused(host: str):
    with pytest.raises(ResourceError, match=f"serve.host={host}"):
        bound(host, 0)
