"""A Hugging Face Hub on the loopback address: the endpoints that huggingface_hub and datasets ask, over repositories in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_TOKEN = "hf_of_the_test", "hf_that_only_reads"


@dataclass
class Repository:
    """Commits of one repository, each with all of its files, and its branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main", removed: Collection[str] = ()) -> str:
        """Adds files to a branch and removes others; returns the commit."""
        before = self.commits.get(self.refs.get(branch, ""), {})
        files = {name: data for name, data in before.items() if name not in removed} | files
        content = repr((self.refs.get(branch), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: (`models` or `datasets`, `owner/name`) -> repository.
        requests: method and path of every request.
        served: bytes of every file that was sent, by path.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.served: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", branch: str = "main") -> str:
        """Commits files, or those of a folder; returns the commit."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        return self.repositories.setdefault((kind, name), Repository()).commit(files, branch)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        """Says nothing."""

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _begin(self) -> list[str]:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {url.path}")
        return [unquote(part) for part in url.path.strip("/").split("/")]

    def _repository(self, kind: str, name: str) -> Repository | None:
        """The repository if the caller may see it; otherwise answers."""
        found = self.server.repositories.get((kind, name))
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._fail(401, "RepoNotFound")
        if found.gated:
            return self._fail(403, "GatedRepo")
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self._begin():
            case ["api", "whoami-v2"]:
                if self._is_known():
                    self._json({"name": "tester", "type": "user", "auth": {}})
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self._about(kind, f"{owner}/{name}", rest)
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._file("datasets", f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._file("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._fail(404, "EntryNotFound")

    def _about(self, kind: str, name: str, rest: list[str]) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return self._fail(404, "RevisionNotFound")
        files = repository.commits[sha]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            private = repository.private
            self._json(
                {"_id": "1", "id": name, "sha": sha, "siblings": siblings, "private": private, "tags": [], "downloads": 0, "likes": 0}
            )
        elif rest[0] == "tree":
            self._json(self._entries(files, "/".join(rest[2:]), self.query.get("recursive", ["false"])[0].lower() == "true"))
        else:
            self._fail(404, "EntryNotFound")

    @staticmethod
    def _entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        prefix, found, folders = f"{folder}/" if folder else "", [], {}
        for path, data in files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                folders |= {prefix + "/".join(parts[:i]): None for i in range(1, len(parts) if recursive else min(2, len(parts)))}
                if len(parts) == 1 or recursive:
                    found.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
        return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders] + found

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return self._fail(404, "RevisionNotFound")
        if path not in repository.commits[sha]:
            return self._fail(404, "EntryNotFound")
        data = repository.commits[sha][path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        status, asked = 200, self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last), len(data) - 1) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        if self.command == "GET":
            self.server.served[path] = self.server.served.get(path, 0) + len(data)
        self._send(status, data, headers)

    def do_POST(self) -> None:
        parts = self._begin()
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", ("models" | "datasets") as kind, owner, name, action, revision]:
                repository = self._repository(kind, f"{owner}/{name}")
                if repository is not None:
                    self._act(repository, kind, f"{owner}/{name}", action, revision)
            case _:
                self._fail(404, "EntryNotFound")

    def _is_known(self, to_write: bool = False) -> bool:
        """Whether the caller's token is one that may read, or write; answers if not."""
        if self.headers.get("Authorization") in [f"Bearer {token}" for token in ((TOKEN,) if to_write else (TOKEN, READ_TOKEN))]:
            return True
        self._json({"error": "Invalid username or password."}, 403 if to_write else 401)
        return False

    def _create(self, asked: dict) -> None:
        if not self._is_known(to_write=True):
            return
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if ("models", name) in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.server.repositories["models", name] = Repository(private=private)
        self.server.repositories["models", name].commit({".gitattributes": b""})
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def _act(self, repository: Repository, kind: str, name: str, action: str, revision: str) -> None:
        sha = repository.refs.get(revision, revision)
        if action == "paths-info":
            asked = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
            entries = {entry["path"]: entry for entry in self._entries(repository.commits.get(sha, {}), "", True)}
            return self._json([entries[path] for path in asked["paths"] if path in entries])
        if not self._is_known(to_write=True):
            return
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(self.body)["files"]]
            return self._json({"files": files})
        if action == "commit":
            lines = [json.loads(line) for line in self.body.splitlines()]
            written = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            removed = [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
            sha = repository.commit(written, removed=removed)
            return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})
        self._fail(404, "EntryNotFound")


@contextmanager
def serving() -> Iterator[HubServer]:
    """Serves in a thread of this process."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """What a process needs to talk to the server, and to keep what it downloads in a folder."""
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def this_process_asks(server: HubServer, home: Path, monkeypatch) -> Iterator[None]:
    """Lets this process talk to the server; the libraries have read their environment long ago."""
    import datasets
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False}.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setenv("HF_TOKEN", "")
    yield
