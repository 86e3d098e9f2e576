"""A small stand-in of the Hugging Face hub on this machine: models, their files, ranges of them, and its errors."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`models`: the files of each. `most_bytes`: after so many bytes of files it answers no more."""

    models: dict[str, dict[str, bytes]]
    most_bytes: int | None = None
    gated: set[str] = field(default_factory=set)
    wrong_hash: bool = False
    claimed_bytes: int = 0  # the size that it names for each large file, in place of the real one
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path of each request for a file
    ranges: list[str] = field(default_factory=list)
    address: str = ""
    sent_bytes: int = 0


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer as the hub does, at `hub.address`, until the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_object(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def answer(self, *, body: bool) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            if path == "/api/models":
                word = parse_qs(parts.query).get("search", [""])[0].lower()
                self.send_object([{"id": name, "_id": name} for name in hub.models if word[:5] in name.lower()])
                return
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.describe(match[1], match[2])
                return
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if match is None or match[1] not in hub.models or match[3] not in hub.models[match[1]]:
                self.refuse(404, "EntryNotFound")
                return
            hub.asked.append((self.command, match[3]))
            self.send_file(hub.models[match[1]][match[3]], body=body)

        def describe(self, name: str, revision: str | None) -> None:
            if name not in hub.models:
                self.refuse(404, "RepoNotFound")
            elif name in hub.gated:
                self.refuse(403, "GatedRepo")
            elif revision not in (None, "main", REVISION):
                self.refuse(404, "RevisionNotFound")
            else:
                files = []
                for file, data in hub.models[name].items():
                    entry: dict[str, Any] = {
                        "rfilename": file,
                        "size": hub.claimed_bytes or len(data),
                        "blobId": "0" * 40,
                    }
                    if file.endswith((".safetensors", ".gguf")):
                        digest = hashlib.sha256(data + b"x" * hub.wrong_hash).hexdigest()
                        entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
                    files.append(entry)
                self.send_object({"id": name, "_id": "1", "sha": REVISION, "siblings": files, "tags": []})

        def send_file(self, data: bytes, *, body: bool) -> None:
            wanted = self.headers.get("Range")
            begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and body else 0
            if begin:
                hub.ranges.append(wanted or "")
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("Accept-Ranges", "bytes")
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if not body:
                return
            rest = data[begin:]
            if hub.most_bytes is not None:
                rest = rest[: max(0, hub.most_bytes - hub.sent_bytes)]
            hub.sent_bytes += len(rest)
            self.wfile.write(rest)
            if len(rest) < len(data) - begin:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variable HF_ENDPOINT does in a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
