"""A server that speaks what huggingface_hub asks of Hugging Face: which commit a branch is, its files, each file."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from tests.shared.servers import QuietHandler, answering


@dataclass
class Hub:
    """repos: files by repository and name; a change makes another commit. gated: repositories without access. read: files that
    were sent whole. cut: files of which half is sent, so many times."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    read: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


@contextlib.contextmanager
def hub_of(repos: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where huggingface_hub looks from now on, online. Its caches are the caller's."""
    hub = Hub(repos)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path.strip("/")
            hub.asked.append(path)
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo in hub.gated or repo not in hub.repos:
                code = "GatedRepo" if repo in hub.gated else "RepoNotFound"
                self._say(403 if repo in hub.gated else 404, b"no", {"X-Error-Code": code})
            elif path.startswith("api/models/"):
                self._api(repo, path.removeprefix(f"api/models/{repo}").strip("/").split("/"))
            else:
                _, revision, name = path.removeprefix(f"{repo}/").split("/", 2)
                self._file(repo, revision, name)

        def _api(self, repo: str, asked: list[str]) -> None:
            files, commit = hub.repos[repo], hub.commit(repo)
            if len(asked) > 1 and asked[1] not in ("main", commit):
                self._say(404, b"no", {"X-Error-Code": "RevisionNotFound"})
            elif asked[0] == "tree":
                tree = [{"type": "file", "path": name, "size": len(each), "oid": _oid(each)} for name, each in files.items()]
                self._say(200, json.dumps(tree).encode(), {"content-type": "application/json"})
            else:
                siblings = [{"rfilename": name} for name in files]
                told = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
                self._say(200, json.dumps(told).encode(), {"content-type": "application/json"})

        def _file(self, repo: str, revision: str, name: str) -> None:
            content = hub.repos[repo].get(name)
            if content is None or revision not in ("main", hub.commit(repo)):
                self._say(404, b"no", {"X-Error-Code": "EntryNotFound"})
                return
            start = 0
            headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": hub.commit(repo), "Accept-Ranges": "bytes"}
            if (wanted := self.headers.get("Range")) is not None:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET" and hub.cut.get(name, 0):
                hub.cut[name] -= 1
                self._say(200 if not start else 206, content[start:], headers, cut=len(content[start:]) // 2)
                self.close_connection = True
                return
            if self.command == "GET":
                hub.read.append(name)  # before whoever reads it can go on
            self._say(200 if not start else 206, content[start:], headers)

        def _say(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])

    with answering(Handler) as port:
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def put_into_cache(cache: Path, repo: str, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """As huggingface_hub lays it out, without the listing that newer releases keep. Returns the snapshot."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "refs").mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob, target = storage / "blobs" / _oid(content), snapshot / name
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(blob)
    return snapshot


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
