"""A stand-in for the Hub: serves the model folders under one folder, and counts what it sends."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    """The Hub's endpoints for model files, over a folder with `org/name/file`. Every model has the one commit `main`.

    Attributes:
        sent: file ("org/name/file") -> bytes of its content that were sent.
        gated, private: ids that only `TOKEN` may read.
        broken: whether every answer is an error of the server.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.broken = False

    @property
    def url(self) -> str:
        """Address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def sent_of(self, *suffixes: str) -> int:
        """Bytes sent of files with these endings."""
        return sum(count for name, count in self.sent.items() if name.endswith(suffixes))


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one packet: two wait 40 ms for each other
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.broken:
            self._answer(503)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.*)?)?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._answer(404)

    def _may(self, model: str, revision: str | None, *, content: bool) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "Authorization" in self.headers and not known:
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not (self.server.folder / model).is_dir() or (model in self.server.private and not known):
            self._answer(404 if known else 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif content and model in self.server.gated and not known:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        else:
            return True
        return False

    def _api(self, model: str, what: str | None, revision: str | None, inside: str | None) -> None:
        if not self._may(model, revision, content=False):
            return
        files = [path for path in sorted((self.server.folder / model).rglob("*")) if path.is_file()]
        names = {path.relative_to(self.server.folder / model).as_posix(): path for path in files}
        if what != "tree":
            siblings = [{"rfilename": name} for name in names]
            self._answer(200, body={"id": model, "modelId": model, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif inside:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, body=[
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                for name, path in names.items()
            ])  # fmt: skip

    def _file(self, model: str, revision: str, name: str) -> None:
        if not self._may(model, revision, content=True):
            return
        path = self.server.folder / model / name
        if not path.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content, headers, status = path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT}, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, size = int(match[1]), len(content)
            content = content[start : int(match[2]) + 1 if match[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
            status = 206
        if self.command == "GET":
            self.server.sent[f"{model}/{name}"] += len(content)
        self._answer(status, headers, content)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: object = b"") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """Run a server over a folder until the block ends."""
    server = HubServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
