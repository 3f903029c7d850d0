"""An HTTP server for the files of a folder, in a thread, whose answers for single files can go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Fault = Literal["slow", "cut", "short length", "long length", "no length", "hang", "403", "404", "503"]


@dataclass
class ShardServer:
    """Serves `folder` at `url`.

    Attributes:
        faults: name of a file -> the faults of the next requests for its content, or one fault of all of them.
        gets: number of requests for the content, by name.
        heads: number of other requests, by name.
        started: is set when the content of a slow file has begun.
    """

    folder: Path
    url: str = ""
    faults: dict[str, list[Fault] | Fault] = field(default_factory=dict)
    gets: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    started: threading.Event = field(default_factory=threading.Event)
    slow_s: float = 0.5
    etag: bool = True

    def fault(self, name: str) -> Fault | None:
        """The fault of the next request for the content of a file."""
        planned = self.faults.get(name)
        if isinstance(planned, list):
            return planned.pop(0) if planned else None
        return planned


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    server = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, *, head: bool) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _answer(server, self, head=head)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None:
            pass  # a killed client is meant

    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()


def _answer(server: ShardServer, request: BaseHTTPRequestHandler, *, head: bool) -> None:
    path = server.folder / request.path.strip("/")
    if path.is_dir():
        links = "".join(f'<a href="{child.name}">{child.name}</a>' for child in sorted(path.iterdir()))
        _send(request, 200, links.encode(), {"Content-Type": "text/html"}, head=head)
        return
    (server.heads if head else server.gets)[path.name] += 1
    fault = server.faults.get(path.name) if head else server.fault(path.name)
    fault = fault if isinstance(fault, str) else None
    if not path.is_file() or fault in ("404", "403", "503"):
        _send(request, int(fault) if fault and fault.isdigit() else 404, b"", {}, head=head)
        return
    data = path.read_bytes()
    fields = {"Content-Type": "application/x-tar"}
    if server.etag:
        fields["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
    if head or fault is None:
        _send(request, 200, data, fields, head=head)
    elif fault == "slow":
        _send(request, 200, data, fields, pause_s=server.slow_s, started=server.started)
    elif fault == "hang":
        server.started.set()
        time.sleep(60)
    else:
        sent = data if fault == "long length" else data[: len(data) // 2]
        length = {"short length": len(sent), "cut": len(data), "long length": len(data) + 100, "no length": None}[fault]
        _send(request, 200, sent, fields, length=length)
        request.close_connection = True


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    fields: dict[str, str],
    *,
    head: bool = False,
    length: int | None = -1,
    pause_s: float = 0.0,
    started: threading.Event | None = None,
) -> None:
    request.send_response(status)
    for name, value in fields.items():
        request.send_header(name, value)
    if length is not None:
        request.send_header("Content-Length", str(len(data) if length == -1 else length))
    else:
        request.send_header("Connection", "close")
    request.end_headers()
    if head:
        return
    half = len(data) // 2 if pause_s else 0
    request.wfile.write(data[:half])
    if pause_s:
        request.wfile.flush()
        if started is not None:
            started.set()
        time.sleep(pause_s)
    request.wfile.write(data[half:])
    request.wfile.flush()
