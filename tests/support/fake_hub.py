"""A Hugging Face hub of one repository on 127.0.0.1: the few addresses that an upload needs."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
            if path.startswith("/upload/"):
                status, answer = hub.answer(self.command, path, body)
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
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

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
