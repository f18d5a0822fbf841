"""A server with the parts of the Hugging Face hub's API that downloads of models and data sets use.

`Hub(folder)` serves repositories in `folder/models/OWNER/NAME` and `folder/datasets/OWNER/NAME`, on this machine and in
a thread. Each has one commit, main. Transfers may break off, and repositories may be private or gated.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
KINDS = ("models", "datasets")


@dataclass
class Hub:
    """The repositories of a folder, and how they are served.

    Args:
        folder: with models/ and datasets/.
        private: names of repositories that need TOKEN; without it the answer is 401, as for a name that is unknown.
        gated: names of repositories whose conditions the user has not accepted; the answer is 403.
        cut: names of files that end after half of their bytes.
        cut_once: the same, for the first request only.
    """

    folder: Path
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    cut_once: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range

    def commit(self, kind: str, name: str) -> str:
        """The one commit of a repository: a hash of its files."""
        found = hashlib.sha1()
        for path in self.files(kind, name):
            found.update(path.read_bytes())
        return found.hexdigest()

    def files(self, kind: str, name: str) -> list[Path]:
        """The files of a repository."""
        return sorted(path for path in (self.folder / kind / name).rglob("*") if path.is_file())

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve the repositories inside this block, at the address that is yielded."""
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: object) -> None:
                self.hub = hub
                super().__init__(*arguments)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        steps = [unquote(step) for step in parts.path.strip("/").split("/")]
        if steps[0] == "api":
            self._api(steps[1:], parse_qs(parts.query), body=body)
        else:
            kind = "datasets" if steps[0] == "datasets" else "models"
            steps = steps[1:] if kind == "datasets" else steps
            self._file(kind, steps, body=body)

    def _api(self, steps: list[str], query: dict[str, list[str]], *, body: bool) -> None:
        if steps[0] not in KINDS or len(steps) < 3:
            self._error(404, "EntryNotFound", body=body)
            return
        kind, name, rest = steps[0], "/".join(steps[1:3]), steps[3:]
        if not self._may_read(kind, name, rest[1] if len(rest) > 1 else "main", body=body):
            return
        files = self.hub.files(kind, name)
        root = self.hub.folder / kind / name
        commit = self.hub.commit(kind, name)
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [path for path in files if str(path.relative_to(root)).startswith(below)]
            listed: object = [self._entry(root, path) for path in found]
            if below and not found:
                self._error(404, "EntryNotFound", body=body)
                return
        elif rest[:1] == ["paths-info"]:
            listed = []
        else:
            siblings = [{"rfilename": str(path.relative_to(root))} for path in files]
            listed = {"id": name, "sha": commit, "private": name in self.hub.private, "siblings": siblings, "tags": []}
        headers = {"Content-Type": "application/json", "X-Repo-Commit": commit}
        self._send(200, json.dumps(listed).encode(), headers, body)

    @staticmethod
    def _entry(root: Path, path: Path) -> dict[str, object]:
        return {
            "type": "file",
            "path": str(path.relative_to(root)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }

    def _file(self, kind: str, steps: list[str], *, body: bool) -> None:
        name, (_, revision, *rest) = "/".join(steps[:2]), steps[2:]
        if not self._may_read(kind, name, revision, body=body):
            return
        path = self.hub.folder / kind / name / "/".join(rest)
        if not path.is_file():
            self._error(404, "EntryNotFound", body=body)
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit(kind, name),
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range", "")
        status, first = 200, 0
        if wanted.startswith("bytes=") and body:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = path.name in self.hub.cut or (body and path.name in self.hub.cut_once)
        if body:
            self.hub.cut_once.discard(path.name)
        self._send(status, data[first:], headers, body, cut=cut)

    def _may_read(self, kind: str, name: str, revision: str, *, body: bool) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not (self.hub.folder / kind / name).is_dir() or (name in self.hub.private and not allowed):
            self._error(401, "RepoNotFound", body=body)
        elif name in self.hub.gated:
            self._error(403, "GatedRepo", body=body)
        elif revision not in ("main", self.hub.commit(kind, name)):
            self._error(404, "RevisionNotFound", body=body)
        else:
            return True
        return False

    def _error(self, status: int, code: str, *, body: bool) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.close_connection = True
