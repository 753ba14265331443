"""A stand-in for the Hugging Face Hub on this machine: the answers of its API that downloads of models need.

As huggingface_hub asks for them: `model_info`, `list_repo_tree`, and HEAD and GET of .../resolve/COMMIT/FILE.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ERROR_CODES = {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}


@dataclass
class Hub:
    """What it serves, and what it was asked for; both may be changed and read at any time."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    repo: str = "owner/tiny"
    status: dict[str, int] = field(default_factory=dict)  # end of a path -> what it is answered with instead
    cut_after: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its connection breaks, once
    asked: list[str] = field(default_factory=list)  # "GET model.safetensors", with " from N" for a range
    url: str = ""

    def loaded(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return sorted(line.split()[1] for line in self.asked if line.startswith("GET ") and "/" not in line)


@contextlib.contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    """Serve it while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            resolve = path.partition("/resolve/")[2]
            name = resolve.partition("/")[2]
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            hub.asked.append(f"{self.command} {name or path}" + (f" from {begin}" if begin else ""))
            status = next((code for end, code in hub.status.items() if path.endswith(end)), None)
            if status is not None:
                return self._refuse(status, ERROR_CODES.get(status, ""))
            if path.startswith(f"api/models/{hub.repo}"):
                return self._api(path.removeprefix(f"api/models/{hub.repo}").strip("/").split("/"))
            if not path.startswith(f"{hub.repo}/resolve/"):
                return self._refuse(404, "RepoNotFound")
            commit = resolve.partition("/")[0]
            if name not in hub.files.get(commit, {}):
                return self._refuse(404, "EntryNotFound")
            self._file(commit, name, begin)

        def _api(self, parts: list[str]) -> None:
            """ "", revision/REV or tree/REV."""
            revision = parts[1] if len(parts) > 1 else "main"
            commit = hub.refs.get(revision, revision)
            if commit not in hub.files:
                return self._refuse(404, "RevisionNotFound")
            names = hub.files[commit]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in names.items()
            ]
            info = {"id": hub.repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            body = json.dumps(tree if parts[0] == "tree" else info).encode()
            self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            self.wfile.write(body)

        def _file(self, commit: str, name: str, begin: int) -> None:
            content = hub.files[commit][name]
            length = {"Content-Length": str(len(content) - begin)}
            if begin:
                length["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            self._head(206 if begin else 200, {**length, **etag, "Accept-Ranges": "bytes"})
            if self.command == "GET":
                end = hub.cut_after.pop(name, None)
                self.wfile.write(content[begin:end])
                self.close_connection = end is not None

        def _refuse(self, status: int, code: str) -> None:
            self._head(status, {"Content-Length": "0", "X-Error-Code": code, "X-Error-Message": "no"})

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
