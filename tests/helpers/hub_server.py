"""A small hub on 127.0.0.1 for tests: what huggingface_hub's client asks of the real one to list and download files.

    with HubServer() as hub:
        hub.add_repo("org/name", {"main": {"config.json": b"{}"}, "v1": {...}})
        hub.attach(monkeypatch, tmp_path)      # this process's client now talks to it, with its home under tmp_path
        ...
        assert hub.count("GET", "config.json") == 1

A revision is a branch; its commit is a hash of its content, so that adding the repository again moves the branch and
keeps the old commit.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Files = Mapping[str, bytes]


@dataclass
class Repo:
    """One repository: its branches, and the files of every commit that a branch ever had."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit; None if there is none."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """One request that the server answered, and how many bytes of a file it sent."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int


class HubServer:
    """The hub. Start and stop it with `with`; all of its state may be changed while it runs.

    Attributes:
        url: its address, for HF_ENDPOINT.
        log: every request so far, in order.
        tokens: the tokens it knows; any other is refused with status 401.
        members: those of them that were granted access to the gated repositories.
        status: where set, the status of every answer: 503 makes it a hub that is down behind its proxy.
    """

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.tokens: set[str] = set()
        self.members: set[str] = set()
        self.status: int | None = None
        self.repos: dict[str, Repo] = {}
        self._cuts: dict[str, tuple[int, int]] = {}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread: threading.Thread | None = None
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection that is open: from now on a connection is refused."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
        self._http.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client has closed it already
                    connection.shutdown(socket.SHUT_RDWR)

    def add_repo(
        self, repo_id: str, revisions: Mapping[str, Files], *, gated: bool = False, private: bool = False
    ) -> None:
        """Add a repository, or move the branches of one that is there.

        Args:
            repo_id: `org/name` or `name`.
            revisions: branch to files, a file being a path to its bytes.
            gated: anyone may list it, only a member's token gets a file. Default: False.
            private: for anyone without a known token it does not exist. Default: False.
        """
        repo = self.repos.setdefault(repo_id, Repo())
        repo.gated, repo.private = gated, private
        for branch, files in revisions.items():
            content = [f"{path}\0{hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items())]
            commit = hashlib.sha1("\n".join([repo_id, *content]).encode()).hexdigest()
            repo.commits[commit] = dict(files)
            repo.branches[branch] = commit

    def commit(self, repo_id: str, revision: str = "main") -> str:
        """The commit that a revision of a repository is at."""
        commit = self.repos[repo_id].commit(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit

    def cut(self, file: str, at: int, times: int = 1) -> None:
        """Close the connection when byte `at` of the file of this name is reached, in the next `times` answers."""
        self._cuts[file] = (at, times)

    def count(self, method: str, file: str = "") -> int:
        """How many requests of this method there were for paths that end in `file`. Default: for any path."""
        return sum(request.method == method and request.path.endswith(file) for request in self.log)

    def sent(self, file: str = "") -> int:
        """How many bytes of files whose path ends in `file` were sent. Default: of all files."""
        return sum(request.sent for request in self.log if request.path.endswith(file))

    def attach(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make this process's huggingface_hub use this hub alone.

        It reads its environment once, when it is imported, so that its constants are set here: the endpoint, a home
        under `home`, no token, no hf-xet. Waits between retries are left out. No other address can be connected to.
        """
        from huggingface_hub import constants

        values: dict[str, Any] = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in values.items():
            # What only some versions of the client have (the harnesses) need not be there.
            monkeypatch.setattr(constants, name, value, raising=name != "AGENT_HARNESSES_PATH")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        connect = socket.socket.connect

        def connect_here(self: socket.socket, address: Any) -> None:
            assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", f"a test connects to {address}"
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", connect_here)

    def _note(self, request: Request) -> None:
        with self._lock:
            self.log.append(request)

    def _take_cut(self, file: str) -> int | None:
        with self._lock:
            at, times = self._cuts.get(file, (0, 0))
            if not times:
                return None
            self._cuts[file] = (at, times - 1)
            return at


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement of its headers

        def setup(self) -> None:
            super().setup()
            with hub._lock:
                hub._connections.add(self.connection)

        def finish(self) -> None:
            with hub._lock:
                hub._connections.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            try:
                if hub.status is not None:
                    raise _Refused(hub.status, "", "out of order")
                if match := re.fullmatch(r"/api/models/((?:[^/]+/)?[^/]+?)(?:/revision/(.+))?", path):
                    self._info(path, match[1], match[2] or "main")
                elif match := re.fullmatch(r"/((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path):
                    self._file(path, match[1], match[2], match[3])
                else:
                    raise _Refused(404, "", "no such page")
            except _Refused as error:
                self._answer(path, error.status, b"", error.headers)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _token(self) -> str | None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            if token is not None and token not in hub.tokens:
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            return token

        def _open(self, repo_id: str, revision: str) -> tuple[Repo, str]:
            token = self._token()
            repo = hub.repos.get(repo_id)
            if repo is None or (repo.private and token is None):
                # As the real hub does: whoever is not known does not learn whether the repository exists.
                raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
            commit = repo.commit(revision)
            if commit is None:
                raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return repo, commit

        def _info(self, path: str, repo_id: str, revision: str) -> None:
            repo, commit = self._open(repo_id, revision)
            files = [{"rfilename": name} for name in repo.commits[commit]]
            info = {"id": repo_id, "sha": commit, "siblings": files, "private": repo.private, "gated": repo.gated}
            self._answer(path, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def _file(self, path: str, repo_id: str, revision: str, file: str) -> None:
            repo, commit = self._open(repo_id, revision)
            if repo.gated and (token := self._token()) not in hub.members:
                raise _Refused(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
            data = repo.commits[commit].get(file)
            if data is None:
                raise _Refused(404, "EntryNotFound", "Entry not found")
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            start, status = 0, 200
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start, status = int(match[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            at = None if self.command == "HEAD" else hub._take_cut(file.rpartition("/")[2])
            self._answer(path, status, data[start:], headers, None if at is None else max(at - start, 0), is_file=True)

        def _answer(
            self,
            path: str,
            status: int,
            body: bytes,
            headers: Mapping[str, str],
            stop_after: int | None = None,
            *,
            is_file: bool = False,
        ) -> None:
            part = b"" if self.command == "HEAD" else body[:stop_after]
            # Noted before it is sent: by the time the client has it all, it is in the log.
            sent = len(part) if is_file else 0
            hub._note(Request(self.command, path, self.headers.get("Range"), status, sent))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(part)
            if stop_after is not None:
                self.close_connection = True

    return Handler
