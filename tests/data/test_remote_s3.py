"""Shards in a bucket give the same batches as on a disk; moto's server stands for the store."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pair_data import remove_joined, write_shards
from remote_data import SIZES, all_same, batches, cached, check_same, read, tables, write_side_tables
from s3_server import KEYS, s3_bucket

from megacid.data.index import ShardIndex, load_index
from megacid.data.index_verify import verify_index
from megacid.data.remote.cache import ShardCache
from megacid.errors import UserError
from megacid.storage import object_store as store

pytest.importorskip("s3fs")


@dataclass
class Bucket:
    local: ShardIndex
    client: Any

    def put(self, name: str, path: Path) -> None:
        self.client.put_object(Bucket="bucket", Key=f"laion/{name}", Body=path.read_bytes())


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    root = tmp_path_factory.mktemp("s3")
    with s3_bucket() as client:
        made = Bucket(write_shards(root / "store", sizes=SIZES), client)
        for name in SIZES:
            made.put(f"{name}.tar", root / "store" / f"{name}.tar")
        made.client.put_object(Bucket="bucket", Key="laion/00000_stats.json", Body=b"{}")
        made.client.put_object(Bucket="bucket", Key="laion/.hidden.tar", Body=b"")
        yield made


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache.open(tmp_path / "cache", 1)


SPELLINGS = [
    "s3://bucket/laion",
    "s3://bucket/laion/*",
    "s3://bucket/*/0000?.tar",
    "s3://bucket/laion/{00000..00007}.tar",
]


def test_tars_in_a_bucket_give_the_same_batches_however_they_are_named(bucket: Bucket, cache: ShardCache) -> None:
    for spelling in SPELLINGS:
        index = load_index(spelling, cache=cache)
        assert index.digest == bucket.local.digest
    for path in cached(cache.directory):
        path.unlink()
    assert all_same(batches(bucket.local), batches(index, workers=1))
    assert len(list(cache.directory.glob("s3-bucket-laion-*"))) == 1  # one cache and index for all of them


def test_side_tables_in_a_bucket_give_the_batches_of_a_disk(bucket: Bucket, cache: ShardCache, tmp_path: Path) -> None:
    write_side_tables(tmp_path / "sides", bucket.local)
    for path in (tmp_path / "sides").rglob("*.*"):
        bucket.client.put_object(Bucket="bucket", Key=str(path.relative_to(tmp_path)), Body=path.read_bytes())
    want = read(bucket.local, tables(tmp_path / "sides", bucket.local))
    remove_joined(bucket.local)
    check_same(want, read(bucket.local, tables("s3://bucket/sides", bucket.local, cache), workers=1))
    assert {path.name[:13] for path in cache.directory.glob("*/*.npy")} >= {"img_emb_00000", "text_emb_0000"}


@pytest.mark.slow  # the same of an HTTP server is not
def test_an_object_that_changed_is_named(bucket: Bucket, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RETRY_S", 0.2)
    monkeypatch.setenv("MEGACID_CACHE_DIR", str(cache.directory))
    load_index("s3://bucket/laion")
    assert verify_index("s3://bucket/laion") == []
    bucket.put("00004.tar", bucket.local.root / "00007.tar")  # of the same size
    try:
        (problem,) = verify_index("s3://bucket/laion")
        assert problem.startswith("s3://bucket/laion/00004.tar has 30720 bytes and version ")
        with pytest.raises(
            UserError, match=r"^s3://bucket/laion/00004.tar has changed since it was indexed: put it back"
        ):
            load_index("s3://bucket/laion", fetch_limit=10**9)  # the listing tells
        for path in cached(cache.directory):
            path.unlink()
        index = load_index("s3://bucket/laion/{00000..00007}.tar", fetch_limit=10**9)
        failure = batches(index)[-1].failure
        assert "s3://bucket/laion/00004.tar has changed (30,720 bytes" in str(failure)
        assert load_index("s3://bucket/laion", ask=True).digest != bucket.local.digest
    finally:
        bucket.put("00004.tar", bucket.local.root / "00004.tar")


@pytest.mark.parametrize(
    ("url", "message"),
    {
        "s3://bucket/laion/00009.tar": r"^s3://bucket/laion/00009.tar does not exist in its store \(",
        "s3://nowhere/laion": r"^s3://nowhere/laion does not exist in its store \(",
        "s3://bucket/empty/*.tar": r"^shards s3://bucket/empty/\*.tar has no .tar file that its store lists",
    }.items(),
)
def test_what_is_not_there_is_one_error(bucket: Bucket, cache: ShardCache, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_index(url, cache=cache)
    assert "\n" not in str(error.value)


def _without_credentials(directory: Path) -> None:
    """In a process of its own: the clients of this one have credentials."""
    import os

    for name in KEYS:
        os.environ.pop(name, None)
    os.environ.update(
        AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE="/nowhere", AWS_SHARED_CREDENTIALS_FILE="/nowhere"
    )
    began, result = time.monotonic(), {}
    for url in ("s3://bucket/laion", "s3://bucket/laion/00000.tar"):
        try:
            load_index(url, cache=ShardCache.open(directory, 1))
        except UserError as error:
            result[url] = str(error)
    result["seconds"] = str(time.monotonic() - began)
    (directory / "result.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_missing_credentials_are_one_error_that_says_where_they_are_found(bucket: Bucket, cache: ShardCache) -> None:
    process = multiprocessing.get_context("fork").Process(target=_without_credentials, args=(cache.directory,))
    process.start()
    process.join(60)
    result = json.loads((cache.directory / "result.json").read_text())
    assert float(result.pop("seconds")) < 20 and len(result) == 2
    for url, text in result.items():
        assert text.startswith(f"{url} may not be read (NoCredentials")
        assert ": the store finds credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE" in text
