"""A Hugging Face hub of one repository on 127.0.0.1: the few addresses that uploads and downloads need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_a_good_one"  # of the user somebody


@dataclass
class Hub:
    address: str = ""
    repository: str | None = None
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    refuses_writing: bool = False
    card_error: str | None = None
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    read: list[str] = field(default_factory=list)  # the files that were downloaded
    gated: bool = False
    status: int | None = None  # of all answers to downloads

    def commit_of(self, revision: str) -> str | None:
        """The commit of a branch, or of itself; it follows from the files."""
        digests = {
            name: hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            for name, files in self.branches.items()
        }
        return digests.get(revision) or (revision if revision in digests.values() else None)

    def files_at(self, revision: str) -> dict[str, bytes]:
        return next(files for name, files in self.branches.items() if revision in (name, self.commit_of(name)))

    def look(self, path: str, body: bytes) -> tuple[int, Any] | None:
        """Answer a question of a download, about a model or a dataset; None if it is another question."""
        pattern = rf"/api/(?:models|datasets)/{self.repository}(?:/(revision|tree|paths-info)/([^/?]+)(?:/(.+))?)?"
        found = re.fullmatch(pattern, path)
        if not found:
            return None
        if self.gated or self.status:
            return self.status or 403, {"error": "refused"} | ({"code": "GatedRepo"} if self.gated else {})
        what, revision, folder = found[1], unquote(found[2] or "main"), unquote(found[3] or "")
        if (commit := self.commit_of(revision)) is None:
            return 404, {"error": f"Invalid rev id: {revision}", "code": "RevisionNotFound"}
        files = self.files_at(revision)
        if what in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            return 200, {
                "id": self.repository,
                "sha": commit,
                "private": self.private,
                "tags": [],
                "siblings": siblings,
            }
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        entries += [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if what == "tree":
            return 200, [one for one in entries if one["path"].startswith(folder and f"{folder}/")]
        wanted = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
        return 200, [one for one in entries if one["path"] in wanted]

    def file(self, path: str) -> tuple[str, str, bytes] | None:
        """The name, the commit and the content of the file at the address of a download."""
        if not (found := re.fullmatch(rf"(?:/datasets)?/{self.repository}/resolve/([^/]+)/(.+)", path)):
            return None
        commit, name = self.commit_of(unquote(found[1])), unquote(found[2])
        return (
            None if commit is None or name not in self.files_at(commit) else (name, commit, self.files_at(commit)[name])
        )

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        values = json.loads(body) if body.startswith(b"{") and b"\n{" not in body else None
        if path == "/api/repos/create":
            return self._create(values)
        if path == "/api/validate-yaml":
            errors = [{"message": self.card_error}] if self.card_error else []
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if found := re.fullmatch(r"/upload/(\w+)", path):
            self.large[found[1]] = body
            return 200, {}
        if path == f"/{self.repository}.git/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in values["objects"]]}
        found = re.fullmatch(rf"/api/models/{self.repository}(?:/(\w+)/([^/?]+))?", path)
        if not found:
            return 404, {"error": "Repository not found"}
        what, revision = found[1], found[2]
        if what is None:
            return 200, {"id": self.repository, "private": self.private, "tags": [], "siblings": []}
        if what == "branch":
            self.branches.setdefault(revision, dict(self.branches["main"]))
            return 200, {}
        if what == "tree":
            files = self.branches[revision].items()
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files]
        if what == "preupload":
            return 200, {"files": [self._mode(one["path"]) for one in values["files"]]}
        assert what == "commit", path
        return self._commit(revision, [json.loads(line) for line in body.splitlines()])

    def _create(self, values: dict[str, Any]) -> tuple[int, Any]:
        name = f"{values['organization'] or 'somebody'}/{values['name']}"
        status = 409 if self.repository == name else 200
        if status == 200:
            self.repository, self.private = name, values.get("visibility") == "private" or bool(values.get("private"))
        return status, {"url": f"{self.address}/{name}", "name": name}

    def _mode(self, name: str) -> dict[str, Any]:
        mode = "lfs" if name.endswith((".safetensors", ".bin", ".gguf")) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        return one | {"actions": {"upload": {"href": f"{self.address}/upload/{one['oid']}", "header": {}}}}

    def _commit(self, revision: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = self.branches[revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "header":
                self.commits.append(value["summary"])
        oid = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        url = f"{self.address}/{self.repository}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if self.command in ("GET", "HEAD") and (found := hub.file(path)):
                self._send_file(*found)
                return
            if path.startswith("/upload/"):
                status, answer = hub.answer(self.command, path, body)
            elif not hub.private and "Authorization" not in self.headers and (known := hub.look(path, body)):
                status, answer = known
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"error": "Invalid credentials"}
            elif hub.refuses_writing:
                status, answer = 403, {"error": "You have read access only"}
            else:
                status, answer = hub.answer(self.command, path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            if "code" in answer:
                self.send_header("X-Error-Code", answer["code"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _send_file(self, name: str, commit: str, content: bytes) -> None:
            size = len(content)
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                content = content[int(found[1]) : int(found[2] or size) + 1]
            self.send_response(206 if found else 200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            if found:
                self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(content) - 1}/{size}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                hub.read.append(name)
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
