"""Plug-ins on the hub: published to, and loaded from, a stand-in of its HTTP interface; folders that travel."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
from huggingface_hub import ModelCard, constants, file_download
from PIL import Image

import lit_prune
from lit_prune.cli import main
from lit_prune.errors import LitPruneError
from lit_prune.loading.locations import hub_place, hub_text, public_name
from lit_prune.plugin import SETTINGS, WEIGHTS, Plugin, fingerprint
from lit_prune.pruners.divprune import DivPrune
from lit_prune.vlm import VLM, as_plugin

PICTURE = Image.new("RGB", (96, 96), "red")
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


def test_a_subfolder_is_part_of_a_name(hub, saved, micro):
    """One repository may hold several plug-ins, and a model."""
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.repositories["me/many"] = [{}, {f"keep_16/deep/{name}": content for name, content in files.items()}]
    hub.repositories["me/many"][-1] |= {f"model/{path.name}": path.read_bytes() for path in MICRO.iterdir()}
    expected = Plugin.from_pretrained(saved)
    try:
        assert same(micro.attach("me/many/keep_16/deep").plugin, expected)
        assert same(micro.attach("me/many", subfolder="keep_16/deep", revision="v1").plugin, expected)
        assert same(micro.attach(saved.parent, subfolder=saved.name).plugin, expected)
    finally:
        micro.detach()
    vlm = lit_prune.load("me/many/model:v1")
    assert vlm.name == "me/many/model:v1"
    assert vlm.plugin is None
    assert fingerprint(vlm.model) == fingerprint(micro.model)
    assert lit_prune.load("me/many", subfolder="model", revision="main").name == "me/many/model:main"
    assert same(lit_prune.load("me/many/keep_16/deep").plugin, expected)


def test_a_card_that_was_edited_is_kept(hub, saved, micro):
    """Here and on the hub; one that was not is renewed."""
    plugin = Plugin.from_pretrained(saved)
    plugin.push_to_hub("me/rcp")
    hub.repositories["me/rcp"][-1] |= {"README.md": b"# mine", "config.json": b"{}", "results.json": b"{}"}
    plugin.push_to_hub("me/rcp")
    assert sorted(hub.repositories["me/rcp"][-1]) == ["README.md", SETTINGS, WEIGHTS]
    assert hub.repositories["me/rcp"][-1]["README.md"] == b"# mine"
    plugin.keep = 24
    plugin.save_pretrained(saved)
    assert "budget: 24 of 144" in (saved / "README.md").read_text()
    (saved / "README.md").write_text("# mine")
    plugin.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "# mine"


@pytest.mark.parametrize(
    ("name", "repository", "options"),
    [
        ("me/rcp", "me/rcp", {}),
        ("me/rcp:v1", "me/rcp", {"revision": "v1"}),
        ("me/rcp:refs/pr/1", "me/rcp", {"revision": "refs/pr/1"}),
        ("me/rcp/a/b", "me/rcp", {"subfolder": "a/b"}),
        ("me/rcp/a:v1", "me/rcp", {"subfolder": "a", "revision": "v1"}),
        ("micro", "micro", {}),
        ("/srv/models/llava", "/srv/models/llava", {}),
        ("./me/rcp:v1", "./me/rcp:v1", {}),
        ("C:\\models\\llava", "C:\\models\\llava", {}),
        ("me/rcp:", "me/rcp:", {}),
        ("", "", {}),
        ("a\0b/c:d", "a\0b/c:d", {}),
    ],
)
def test_names_of_repositories(name, repository, options):
    assert hub_place(name) == (repository, options)
    assert hub_text(repository, options) == name


def test_options_are_checked(micro, saved):
    for options, sentence in (({"revison": "v1"}, "no option `revison`"), ({"revision": 3}, "revision=3 must be text")):
        with pytest.raises(LitPruneError, match=sentence):
            micro.attach(saved, **options)
    with pytest.raises(LitPruneError, match="revision is an option of plug-ins on the hub"):
        micro.attach("divprune", keep=16, revision="v1")
    with pytest.raises(LitPruneError, match="token is an option of plug-ins on the hub"):
        micro.attach(DivPrune(), keep=16, token="x")


# -- folders that travel --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("micro", "micro"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("me/rcp/sub:v1", "me/rcp/sub:v1"),
        ("/home/me/hub/models--me--llava/snapshots/0a1b", "me/llava"),
        ("/srv/models/llava", "local"),
        ("./llava", "local"),
        ("~/llava", "local"),
        ("a/b/c/../d", "local"),
        ("tests/data", "local"),
    ],
)
def test_names_that_others_know(name, public, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    assert public_name(name) == public


def test_a_folder_written_on_one_machine_loads_on_another(micro, tmp_path, monkeypatch):
    """Base model and plug-in lie elsewhere there; the fingerprint says that the base is the right one."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(MICRO, here / "base")
    vlm = lit_prune.load(here / "base").attach("rcp", keep=16)
    tiny.shake(vlm.plugin, 0.05)
    vlm.save_pretrained(here / "plugin")
    expected = vlm.answer(PICTURE, "is there a star ?", max_new_tokens=4)
    for file in (here / "plugin").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert json.loads((here / "plugin" / SETTINGS).read_text())["base"] == "local"
    here.rename(there)
    for load in (
        lambda: lit_prune.load(there / "base").attach(there / "plugin"),
        lambda: VLM.from_pretrained(there / "plugin", base=there / "base"),
    ):
        assert load().answer(PICTURE, "is there a star ?", max_new_tokens=4) == expected
    for load in (lambda: lit_prune.load(there / "plugin"), lambda: VLM.from_pretrained(there / "plugin")):
        with pytest.raises(LitPruneError, match="was a folder where it was made, and isn't named"):
            load()
    with pytest.raises(LitPruneError, match="trained for the weights of a local model"):
        lit_prune.load("micro", random_weights=True).attach(there / "plugin")
    # Written by an earlier version: an absolute path, and the mixin's config.json.
    settings = json.loads((there / "plugin" / SETTINGS).read_text())
    (there / "plugin" / "config.json").write_text('{"base": "", "keep": null}')
    for base, name in ((str(there / "base"), str(there / "base")), (str(here / "base"), None)):
        (there / "plugin" / SETTINGS).write_text(json.dumps(settings | {"base": base}))
        if name is None:
            with pytest.raises(LitPruneError, match="isn't named"):
                lit_prune.load(there / "plugin")
        else:
            assert lit_prune.load(there / "plugin").name == name


def test_a_plugin_folder_is_a_model_for_loading_and_for_the_commands(saved, micro, tmp_path, capsys, monkeypatch):
    vlm = lit_prune.load(saved)
    assert (vlm.name, vlm.plugin.keep) == ("micro", 16)
    PICTURE.save(tmp_path / "0.png")
    main(["generate", "--image", str(tmp_path / "0.png"), "--prompt", "is there a star ?", "--model", str(saved)])
    shown = capsys.readouterr().out
    assert "16" in shown
    assert "RCP" in shown


def test_a_card_and_no_config(saved, micro, tmp_path):
    """What the hub reads of a card; a model's folder is not written into."""
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", SETTINGS, WEIGHTS]
    plugin = Plugin.from_pretrained(saved)
    plugin.base = "llava-hf/llava-1.5-7b-hf:v1"
    plugin.results = {"weights": "of another", "data": "x", "date": "x", "figures": {}}
    plugin.save_pretrained(tmp_path / "card", license="llama2")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "base_model_relation": "adapter",
        "library_name": "lit_prune",
        "license": "llama2",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visual-token-pruning"],
    }
    for line in ("schedule: 15 from layer 1", "budget: 16 of 144", 'lit_prune.load("FOLDER")', "vlm.attach("):
        assert line in card.text
    assert "Measured" not in card.text
    shutil.copytree(MICRO, tmp_path / "model")
    with pytest.raises(LitPruneError, match="is the folder of a model"):
        plugin.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
