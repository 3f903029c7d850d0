"""An S3 server with an empty bucket: moto's, which processes that are forked meanwhile find by the environment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_bucket() -> Iterator[Any]:
    """boto3's client of a server with the bucket `bucket`."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with s3_at(f"http://{host}:{port}"):
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket")
            yield client
    finally:
        server.stop()


@contextlib.contextmanager
def s3_at(url: str) -> Iterator[None]:
    """Makes `url` the store of s3:// URLs."""
    s3fs = pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # which keeps the clients of an earlier server
        yield
    s3fs.S3FileSystem.clear_instance_cache()
