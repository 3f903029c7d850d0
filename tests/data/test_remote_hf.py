"""Shards of a repository with the API of the Hugging Face Hub give the same batches as on a disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pair_data import write_shards
from remote_data import SIZES, all_same, batches, cached

from megacid.data.index import load_index
from megacid.data.remote.cache import ShardCache
from megacid.errors import UserError
from megacid.storage import object_store as store

API = "/api/datasets/org/laion"


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(URL, list of the requests so far) of a server with the repository datasets/org/laion."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            requests.append(path)
            if path == API:
                self.answer(200, json.dumps({"id": "org/laion", "sha": "1" * 40, "siblings": []}).encode())
            elif path == f"{API}/tree/main":
                self.answer(200, json.dumps([entry(tar) for tar in sorted(folder.glob("*.tar"))]).encode())
            elif path.startswith("/datasets/org/laion/resolve/main/"):
                self.answer(200, (folder / path.rpartition("/")[2]).read_bytes(), "application/x-tar")
            else:
                self.answer(401, b"{}")  # as for a repository that is private, or not there

        def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def entry(path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_tars_of_a_repository_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("fsspec.config")
    local, cache = write_shards(tmp_path / "store", sizes=SIZES), ShardCache.open(tmp_path / "cache", 1)
    with hub(tmp_path / "store") as (url, requests):
        monkeypatch.setattr(store, "_THREADS", 2)
        monkeypatch.setitem(config.conf, "hf", {"endpoint": url})
        index = load_index("hf://datasets/org/laion/{00000..00007}.tar", cache=cache, ask=True)
        assert index.digest == local.digest
        assert requests.count(f"{API}/tree/main") <= 3  # one for each thread, not for each tar
        assert load_index("hf://datasets/org/laion", cache=cache).digest == local.digest
        for path in cached(cache.directory):
            path.unlink()
        assert all_same(batches(local), batches(index, workers=1))
        with pytest.raises(UserError, match=r"^hf://datasets/org/laion/00009.tar does not exist in its store \("):
            load_index("hf://datasets/org/laion/00009.tar", cache=cache)
        with pytest.raises(
            UserError, match=r"^hf://datasets/org/other may not be read .* credentials in HF_TOKEN, or hf"
        ):
            load_index("hf://datasets/org/other", cache=cache)
