"""A Hub of its own for tests: the requests that `huggingface_hub` makes to push and to load, over a real socket.

It keeps files in memory, remembers every byte that came in, and gives out nothing private without the token. Clients
run in processes of their own with `client_environment`, because they read their settings when they are imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "stubtoken" * 4
LARGE = (".safetensors", ".bin", ".png", ".pt", ".model")


@dataclass
class Repository:
    """One repository: its files at the last commit, and all that led there."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode() + b"".join(self.files.values())).hexdigest()


class HubStub(ThreadingHTTPServer):
    """The server; `with HubStub() as hub:` runs it.

    Attributes:
        repositories: Name → repository.
        uploaded: Every body that came in, for a search.
        requests: `METHOD path` of every request.
        unknown: Requests that no route answers.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploaded: list[bytes] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def client_environment(self, home, *, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process that talks to this Hub and no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        settings = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return kept | settings | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    """Routes of the Hub, as far as pushing and loading a model need them."""

    protocol_version = "HTTP/1.1"
    server: HubStub

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            content = b"".join(parts)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.uploaded.append(content)
        return content

    def answer(self, content=b"", status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        content = self.body() if self.command in ("POST", "PUT") else b""
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, content, *found.groups())
        self.server.unknown.append(f"{self.command} {path}")
        return self.answer({"error": "not here"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815 - the server's own names

    def owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository | None:
        """The repository, unless it is private and the client is a stranger."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.owner()):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        return found

    # --- routes ---------------------------------------------------------------------------------------------

    def create(self, content: bytes) -> None:
        if not self.owner():
            return self.answer({"error": "Invalid credentials"}, 401)
        asked = json.loads(content)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self.answer(url)

    def whoami(self, _: bytes) -> None:
        who = {"name": "tester", "type": "user", "orgs": []}
        self.answer(who if self.owner() else {}, 200 if self.owner() else 401)

    def validate(self, content: bytes) -> None:
        text = json.loads(content)["content"]
        self.answer({"errors": [] if text.startswith("---\n") else [{"message": "no front matter"}], "warnings": []})

    def preupload(self, content: bytes, name: str, _: str) -> None:
        if self.repository(name) is not None:
            asked = json.loads(content)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False}
                for one in asked
            ]  # fmt: skip
            self.answer({"files": modes})

    def batch(self, content: bytes, name: str) -> None:
        if self.repository(name) is not None:
            objects = json.loads(content)["objects"]
            for one in objects:
                if one["oid"] not in self.server.large:
                    one["actions"] = {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})

    def store(self, content: bytes, oid: str) -> None:
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.server.large[oid] = content
        self.answer(status=200 if right else 400)

    def commit(self, content: bytes, name: str, _: str) -> None:
        found = self.repository(name)
        if found is None:
            return None
        if not self.owner():
            return self.answer({"error": "Forbidden"}, 403)
        for line in content.splitlines():
            one = json.loads(line)
            kind, value = one["key"], one["value"]
            if kind == "header":
                found.commits.append(value["summary"])
            elif kind == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                found.files[value["path"]] = self.server.large[value["oid"]]
            elif kind == "deletedFile":
                del found.files[value["path"]]
        self.server.uploaded += list(found.files.values())
        address = f"{self.server.url}/{name}/commit/{found.sha}"
        return self.answer({"success": True, "commitOid": found.sha, "commitUrl": address, "hookOutput": ""})

    def info(self, _: bytes, name: str) -> None:
        if (found := self.repository(name)) is not None:
            files = [{"rfilename": path} for path in sorted(found.files)]
            self.answer(
                {"_id": "0", "id": name, "sha": found.sha, "private": found.private, "siblings": files, "tags": []}
            )

    def tree(self, _: bytes, name: str) -> None:
        if (found := self.repository(name)) is not None:
            self.answer(
                [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                 for path, content in sorted(found.files.items())]
            )  # fmt: skip

    def resolve(self, _: bytes, name: str, path: str) -> None:
        if (found := self.repository(name)) is None:
            return None
        if path not in found.files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found.sha)
        content = found.files[path]
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=found.sha)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"/api/repos/create", Handler.create),
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{NAME}/preupload/(\w+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(\w+)", Handler.commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/large/(\w+)", Handler.store),
    (rf"/api/models/{NAME}/tree/\w+(?:/.*)?", Handler.tree),
    (rf"/api/models/{NAME}(?:/revision/\w+)?", Handler.info),
    (rf"/{NAME}/resolve/\w+/(.+)", Handler.resolve),
)
