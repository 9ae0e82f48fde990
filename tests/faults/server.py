"""Shards over HTTP, from a server that does one thing wrong for some requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HANGING = 300.0  # seconds without a byte
WRONGS = ("hangs", "cuts", "403", "429", "503", "redirects", "wrong bytes")


@dataclass
class Server:
    """`wrong` says what it does wrong in the next `times` requests."""

    address: str
    wrong: str = ""
    times: int = 0


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wrong = state.wrong if state.times > 0 else ""
            state.times -= bool(wrong)
            if wrong == "hangs":
                time.sleep(HANGING)
                return
            if wrong.isdigit():
                self.send_error(int(wrong))
                return
            if wrong == "redirects":
                self.send_response(302)
                self.send_header("Location", f"{self.path}?again")
                self.end_headers()
                return
            content = (folder / self.path.strip("/").partition("?")[0]).read_bytes()
            first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            part = content[first:]
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if wrong == "wrong bytes":
                part = part[::-1]
            self.wfile.write(part[: len(part) // 2] if wrong == "cuts" else part)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Server(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
