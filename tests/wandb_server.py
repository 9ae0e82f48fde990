"""A server with just what wandb's client needs: who asks, what a run has, and lines appended to it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ENTITY = {"id": "entity", "name": "me"}
PROJECT = {"id": "project", "name": "hive_scale", "entity": ENTITY}
VIEWER = {"id": "viewer", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
HISTORY = "wandb-history.jsonl"


class Server(ThreadingHTTPServer):
    """`history`: by run id, the lines that it was sent; `asked`: all that it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, list[str]] = defaultdict(list)
        self.asked: list[str] = []

    def handle_error(self, *_: Any) -> None:
        """A client that leaves resets its connections."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def steps(self, run: str) -> list[int]:
        return [json.loads(line)["step"] for line in self.history[run]]

    def bucket(self, run: str) -> dict[str, Any] | None:
        lines = self.history.get(run)
        if not lines:
            return None
        texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": "{}", "eventsTail": "[]", "notes": ""}
        counts = {"historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0}
        tail = {"historyTail": json.dumps(lines[-1:])}
        return {"id": run, "name": run, "displayName": run, "tags": []} | texts | counts | tail

    def answer(self, query: str, words: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            run = {"id": words["name"], "name": words["name"], "displayName": words["displayName"], "project": PROJECT}
            rest = {"description": "", "config": "{}", "sweepName": None, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": run | rest, "inserted": words["name"] not in self.history}}
        if "RunResumeStatus" in query:
            return {"model": PROJECT | {"bucket": self.bucket(words["name"])}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in words["files"]]
            return {"createRunFiles": {"runID": words["run"], "uploadHeaders": [], "files": files}}
        return {"viewer": VIEWER, "serverInfo": {"features": []}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.path} {body.decode(errors='replace')}")
        found: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            found = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            sent = json.loads(body).get("files", {}).get(HISTORY, {"offset": 0, "content": []})
            lines = self.server.history[self.path.split("/")[-2]]
            lines[sent["offset"] :] = sent["content"]
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
