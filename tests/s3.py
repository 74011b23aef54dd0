"""S3 as moto plays it, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
import pytest


@contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """The address of a new bucket. The environment names its server meanwhile."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    settings["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in settings.items():
            patch.setenv(setting, value)
        # moto keeps its buckets for as long as the process lives, whatever the server
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps a client, and with it the server of an earlier test
        fsspec.filesystem("s3").mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
