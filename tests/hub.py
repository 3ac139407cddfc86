"""A hub on this machine: what of its protocol an upload of small files speaks."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was sent to it.

    Attributes:
        repositories: whether each is private, by name.
        files: their contents, by name and path.
        refuses: the status that the next commits get; 0 takes them.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.refuses = 0
        self.url = ""


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that knows the token `good`, while this lasts."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != "Bearer good":
                self.answer(401, {"error": "Invalid user token."})
            elif self.path.startswith("/api/whoami"):
                self.answer(200, {"name": "me", "type": "user"})
            elif (name := "/".join(self.path.split("/")[3:5])) in found.repositories:
                private = found.repositories[name]
                self.answer(200, {"id": name, "private": private, "sha": "0" * 40, "siblings": []})
            else:
                self.answer(404, {"error": "Repository not found"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            name = "/".join(self.path.split("/")[3:5])
            if self.path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given.get('organization') or 'me'}/{given['name']}"
                if not name.startswith("me/"):
                    self.answer(403, {"error": "You don't have the rights"})
                    return
                is_private = given.get("visibility") == "private" or given.get("private")
                found.repositories.setdefault(name, bool(is_private))
                self.answer(200, {"url": f"{found.url}/{name}"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif "/commit/" in self.path and found.refuses:
                self.answer(found.refuses, {"error": "out of space"})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        found.files[name, value["path"]] = base64.b64decode(value["content"])
                url = f"{found.url}/{name}/commit/{'0' * 40}"
                self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
            else:
                self.answer(200, {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
