"""Stand-ins for hubs, on this machine: folders served the way their clients ask for them."""

import base64
import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository me/digits. me/secret is private, and a file named in `cut` comes half."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.cut, self.asked = folder, set[str](), list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.server.asked.append(f"{self.command} {path}")
        files = {
            str(one.relative_to(self.server.folder)): one for one in self.server.folder.rglob("*") if one.is_file()
        }
        if path.startswith("api/models/me/digits/revision/"):
            if not path.endswith(("/main", "/v1", COMMIT)):
                return self.say(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in files]
            return self.say(200, {"id": "me/digits", "modelId": "me/digits", "sha": COMMIT, "siblings": siblings})
        if path.startswith("api/models/me/digits/tree/"):
            return self.say(200, [entry(name, one) for name, one in files.items()])
        start = f"me/digits/resolve/{COMMIT}/"
        if path.startswith(start) and path.removeprefix(start) in files:
            return self.give(path.removeprefix(start), files[path.removeprefix(start)].read_bytes())
        self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def give(self, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked, status = self.headers.get("Range"), 200
        if asked:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        self.answer(status, content, headers, self.command == "GET" and name in self.server.cut)

    def answer(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


def entry(name: str, path: Path) -> dict[str, object]:
    """A line of the listing of a repository."""
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


PROJECT = {"id": "UA==", "internalId": "UA==", "name": "project", "entity": {"name": "me"}}
COLLECTION = {"__typename": "ArtifactSequence", "name": "digits", "project": PROJECT}
ARTIFACT = {
    "__typename": "Artifact", "id": "QQ==", "artifactSequence": COLLECTION, "versionIndex": 0, "description": None,
    "artifactType": {"name": "model"}, "metadata": None, "ttlDurationSeconds": -2, "ttlIsInherited": False, "tags": [],
    "historyStep": None, "state": "COMMITTED", "size": 10, "digest": "d", "commitHash": "c", "fileCount": 2,
    "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": [],
}  # fmt: skip
MEMBER = {
    "__typename": "ArtifactCollectionMembership", "id": "TQ==", "versionIndex": 0, "createdAt": "2026-01-01T00:00:00",
    "aliases": [{"__typename": "ArtifactAlias", "id": "TA==", "alias": "latest"}], "artifactCollection": COLLECTION,
    "artifact": ARTIFACT,
}  # fmt: skip
VIEWER = {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


class WeightsHub(Hub):
    """Serves one folder as the artifact me/project/digits:latest, version v0, the way W&B's client asks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = WeightsAnswers

    def manifest(self) -> dict[str, object]:
        files = {str(one.relative_to(self.folder)): one.read_bytes() for one in self.folder.rglob("*") if one.is_file()}
        contents: dict[str, object] = {
            name: {"digest": base64.b64encode(hashlib.md5(content).digest()).decode(), "size": len(content)}
            for name, content in files.items()
        }
        contents["fid.json"] = {"digest": "x", "size": 1, "ref": "file:///etc/passwd"}
        policy = {"storagePolicy": "wandb-storage-policy-v1", "storagePolicyConfig": {"storageLayout": "V2"}}
        return {"version": 1, **policy, "contents": contents}


class WeightsAnswers(Answers):
    server: WeightsHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        asked = re.search(rb"query (\w+)", body)
        name = asked[1].decode() if asked else ""
        self.server.asked.append(f"query {name}")
        known = b'"digits:latest"' in body or b'"digits:v0"' in body
        answers = {
            "Viewer": {"viewer": VIEWER},
            "GetDefaultEntity": {"viewer": VIEWER},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ArtifactMembershipByName": {"project": {"artifactCollectionMembership": MEMBER if known else None}},
            "FetchArtifactManifest": {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.server.url}/m"}}}},
        }
        self.say(200, {"data": answers.get(name, {})})

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if path == "m":
            return self.say(200, self.server.manifest())
        for one in self.server.folder.rglob("*"):
            if one.is_file() and path.startswith("artifactsV2/") and hashlib.md5(one.read_bytes()).hexdigest() in path:
                return self.answer(200, one.read_bytes(), {}, one.name in self.server.cut)
        self.say(404, {})


@contextmanager
def hub(folder: Path, kind: type[Hub] = Hub) -> Iterator[Hub]:
    server = kind(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def as_cached(folder: Path, cache: Path, name: str, revision: str = "main") -> Path:
    """Lay a folder out as the Hugging Face client caches a repository; returns the snapshot's folder."""
    base = cache / f"models--{name.replace('/', '--')}"
    snapshot = base / "snapshots" / COMMIT
    for path in (one for one in folder.rglob("*") if one.is_file()):
        blob = base / "blobs" / hashlib.sha1(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / revision).write_text(COMMIT)
    return snapshot
