"""Plug-ins on the hub: published to, and loaded from, a stand-in of its HTTP interface; folders that travel."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
from huggingface_hub import constants, file_download

import lit_prune
from lit_prune.cli import main
from lit_prune.errors import LitPruneError
from lit_prune.plugin import SETTINGS, WEIGHTS, Plugin
from lit_prune.vlm import VLM, as_plugin

MICRO = tiny.ROOT / "lit_prune" / "micro" / "weights"


# -- a stand-in of the hub ------------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: a list of commits each, and the branches and tags that name them."""

    repositories: dict[str, list[dict[str, bytes]]]
    tokens: list[str]

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        self.tokens.append(self.headers.get("Authorization", ""))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name == "me/forbidden":
                return self._send({"error": "forbidden"}, 403)
            self.repositories.setdefault(name, [{}])
            return self._send({"url": f"https://huggingface.co/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        _, _, _, owner, name, action, *_ = path.split("/")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        return self._commit(f"{owner}/{name}", body)

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.repositories[name][-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
        self.repositories[name].append(files)
        oid = self._oid(name, len(self.repositories[name]) - 1)
        self._send({"commitUrl": f"https://huggingface.co/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization", ""))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if (found := self._find(name, revision)) is None:
                return self._missing(name)
            oid, files = found
            if parts[4:5] == ["tree"]:
                entries = [{"type": "file", "path": f, "oid": oid, "size": len(text)} for f, text in files.items()]
                return self._send(entries)
            return self._send({"id": name, "sha": oid, "siblings": [{"rfilename": file} for file in files]})
        if len(parts) < 5 or parts[2] != "resolve":
            return self._send({}, 200 if parts == [""] else 404)
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self._find(name, revision)
        if found is None or file not in found[1]:
            return self._missing(name, "EntryNotFound" if found else "")
        content = found[1][file]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self._send(content, 200, headers)

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        names = {self._oid(name, place): place for place in range(len(commits))} | {"main": len(commits) - 1, "v1": 1}
        place = names.get(revision, -1)
        return (self._oid(name, place), commits[place]) if 0 <= place < len(commits) else None

    @staticmethod
    def _oid(name: str, place: int) -> str:
        return hashlib.sha1(f"{name}{place}".encode()).hexdigest()

    def _missing(self, name: str, code: str = "") -> None:
        code = code or ("RevisionNotFound" if name in self.repositories else "RepoNotFound")
        self._send({"error": code}, 404, {"X-Error-Code": code})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if headers and "ETag" in headers else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    """A hub of this test's own, and an empty cache."""
    kind = type("OwnHub", (Hub,), {"repositories": {}, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in (constants, file_download):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield kind
    server.shutdown()


@pytest.fixture(scope="module")
def micro() -> VLM:
    return lit_prune.load("micro")


@pytest.fixture
def saved(micro, tmp_path) -> Path:
    """An RCP plug-in with moved weights, made for micro."""
    micro.attach("rcp", keep=16)
    tiny.shake(micro.plugin, 0.05)
    micro.save_pretrained(tmp_path / "rcp")
    micro.detach()
    return tmp_path / "rcp"


def same(a: Plugin, b: Plugin) -> bool:
    return a.settings() == b.settings() and a.content() == b.content()


# -- publishing and loading -----------------------------------------------------------------------------------------
def test_published_and_loaded_by_every_door(hub, saved, micro, tmp_path, capsys):
    """Push twice, so that there are two revisions; load each by options and by name."""
    first = Plugin.from_pretrained(saved)
    main(["export", str(saved), "--out", str(tmp_path / "out"), "--push", "me/rcp", "--private", "--license", "mit"])
    assert "published: https://huggingface.co/me/rcp/commit/" in capsys.readouterr().err
    files = hub.repositories["me/rcp"][-1]
    assert sorted(files) == ["README.md", SETTINGS, WEIGHTS]
    assert b'vlm.attach("me/rcp")' in files["README.md"]
    assert b"license: mit" in files["README.md"]
    second = Plugin.from_pretrained(saved)
    tiny.shake(second, 0.1)
    second.push_to_hub("me/rcp", token="hf_secret")
    assert "Bearer hf_secret" in hub.tokens
    try:
        assert micro.attach("me/rcp").plugin.content() == second.content()
        assert same(micro.attach("me/rcp", revision="v1").plugin, first)
        assert micro.attach("me/rcp:v1!@24").plugin.keep == 24
        assert micro.plugin.repair is None
    finally:
        micro.detach()
    assert same(lit_prune.load("me/rcp:v1").plugin, first)
    assert same(VLM.from_pretrained("me/rcp", revision="v1", token="hf_other").plugin, first)
    assert "Bearer hf_other" in hub.tokens
    for plugin in (lit_prune.load("me/rcp", revision="main").plugin, as_plugin("me/rcp")):
        assert plugin.content() == second.content()
    with pytest.raises(LitPruneError, match="me/rcp has no revision v9"):
        as_plugin("me/rcp:v9")
    for name in ("me/rcp:v9", "me/none"):
        with pytest.raises(LitPruneError, match=name.partition(":")[0]):
            lit_prune.load(name)
        with pytest.raises(LitPruneError, match=f"plug-in {name}"):
            as_plugin(name)
    with pytest.raises(LitPruneError, match=r"me/forbidden can't be published: .*403"):
        first.push_to_hub("me/forbidden")
