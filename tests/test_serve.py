"""`lit-prune serve`: answers equal those of `answer`, requests are checked and limited, nothing is lost."""

import asyncio
import base64
import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from torch import Tensor

import lit_prune
from lit_prune.cli import main
from lit_prune.errors import LitPruneError
from lit_prune.vlm import VLM

httpx = pytest.importorskip("httpx")
for name in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    pytest.importorskip(name)

from lit_prune.commands._support.serving import download as web  # noqa: E402
from lit_prune.commands._support.serving.images import ImageSources  # noqa: E402
from lit_prune.commands._support.serving.limits import Limits  # noqa: E402
from lit_prune.commands._support.serving.server import Server, listen  # noqa: E402

IN_PROGRESS = "lit_prune_requests_in_progress"
CODE_200 = 'lit_prune_requests_total{code="200"}'
CHAT = "/v1/chat/completions"
QUESTIONS = [
    "what colour is the circle ?",
    "how many red circles are in the picture ?",
    "is there a star ?",
    "what is left of the blue square in the picture ?",
]
DRAWN = np.random.default_rng(0)
IMAGES = [Image.fromarray(DRAWN.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in QUESTIONS]


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def asked(text: str, *urls: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return {"max_tokens": 4, "messages": [message]} | fields


BODIES = [asked(question, data_url(png(image))) for question, image in zip(QUESTIONS, IMAGES, strict=True)]


def text_of(response: httpx.Response) -> str:
    """The answer in a response, streamed or whole."""
    if "event-stream" not in response.headers["content-type"]:
        return response.json()["choices"][0]["message"]["content"].strip()
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.strip()]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events).strip()


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return lit_prune.load("micro").attach("divprune", keep=16)


@contextmanager
def running(vlm: VLM, urls: str = "public", folder: Path | None = None, **limits: Any) -> Iterator[httpx.Client]:
    """A client of a server on loopback."""
    server = Server(vlm, "micro", ImageSources(urls, folder, Limits(**limits))).uvicorn()
    waiting = listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[waiting])))
    address = f"http://127.0.0.1:{waiting.getsockname()[1]}"
    thread.start()
    try:
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(vlm) -> Iterator[httpx.Client]:
    with running(vlm) as client:
        yield client


def counters(client: httpx.Client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


# -- answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["rcp@24", "visionzip@16", "full"])
def test_answers_are_those_of_answer_one_by_one_at_once_and_streamed(vlm, client, method):
    plugin = vlm.plugin
    vlm.attach(method)
    try:
        expected = vlm.answer(IMAGES, QUESTIONS, max_new_tokens=4)
        before = counters(client)
        assert [text_of(client.post(CHAT, json=body)) for body in BODIES] == expected
        bodies = [{**body, "stream": number % 2 == 0} for number, body in enumerate(BODIES)]
        with ThreadPoolExecutor(len(bodies)) as pool:
            responses = list(pool.map(lambda body: client.post(CHAT, json=body), bodies))
        assert [text_of(response) for response in responses] == expected
        sent = before.get(CODE_200, 0) + 8
        while (after := counters(client)).get(CODE_200, 0) < sent:  # counted when an answer has been sent
            time.sleep(0.01)
    finally:
        vlm.attach(plugin)
    change = {name: after[name] - before.get(name, 0) for name in after}
    kept = {"full": 144, "rcp@24": 24}.get(method, 16)
    assert change['lit_prune_requests_total{code="200"}'] == 8
    assert change["lit_prune_visual_tokens_total"] == 8 * 144
    assert change["lit_prune_visual_tokens_kept_total"] == pytest.approx(8 * kept)
    assert change["lit_prune_time_to_first_token_seconds_count"] == 8
    assert change["lit_prune_generated_tokens_total"] >= 8
    assert change["lit_prune_request_errors_total"] == after["lit_prune_requests_in_progress"] == 0


def test_openai_client(vlm, client):
    from openai import BadRequestError, OpenAI

    own = OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="none", max_retries=0)
    expected = vlm.answer(IMAGES[0], QUESTIONS[0], max_new_tokens=4)
    answer = own.chat.completions.create(model="micro", temperature=0, **BODIES[0])
    assert answer.choices[0].message.content.strip() == expected
    assert answer.usage.prompt_tokens == vlm.encode(IMAGES[:1], QUESTIONS[:1])["input_ids"].shape[1]
    chunks = own.chat.completions.create(model="micro", stream=True, **BODIES[0])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == expected
    assert [model.id for model in own.models.list()] == ["micro"]
    with pytest.raises(BadRequestError, match="`n` is not supported"):
        own.chat.completions.create(model="micro", n=2, **BODIES[0])


def test_several_images_and_none(vlm, client):
    two = asked("is there a star ?", *(data_url(png(image)) for image in IMAGES[:2]))
    response = client.post(CHAT, json=two)
    assert response.json()["usage"]["prompt_tokens"] > 2 * 144
    before = counters(client)["lit_prune_visual_tokens_total"]
    assert client.post(CHAT, json=asked("is there a star ?")).status_code == 200
    assert counters(client)["lit_prune_visual_tokens_total"] == before


def test_transparency_rotation_and_16_bits_are_read_as_answer_reads_them(vlm, client, tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    grey = Image.fromarray(DRAWN.integers(0, 65536, (80, 96), dtype=np.uint16))
    IMAGES[0].save(tmp_path / "0.jpg", exif=rotated)
    IMAGES[1].convert("RGBA").save(tmp_path / "1.png")
    grey.save(tmp_path / "2.png")
    for path in sorted(tmp_path.iterdir()):
        response = client.post(CHAT, json=asked(QUESTIONS[0], data_url(path.read_bytes())))
        assert text_of(response) == vlm.answer(path, QUESTIONS[0], max_new_tokens=4)


# -- other addresses ------------------------------------------------------------------------------------------------
def test_only_what_serves_the_pruned_model_is_reachable(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["micro"]
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/completions", "/v1/audio/transcriptions"):
        assert client.post(path, json={"model": "micro"}).status_code == 404
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


# -- malformed requests ---------------------------------------------------------------------------------------------
def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "is there a star ?"} | fields]}


def part(**fields: Any) -> dict[str, Any]:
    return message(content=[fields])


MALFORMED = {
    b"": "no JSON object",
    b"{": "no JSON object",
    b"[1]": "no JSON object",
    b"\xff": "error parsing the body",
    b"[" * 50_000: "error parsing the body",
    b"{}": "`messages` must be a list",
    b'{"messages": 3}': "`messages` must be a list",
    b'{"messages": [3]}': "needs a `role`",
    b'{"messages": [{"role": "tool", "content": "x"}]}': "needs a `role`",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "surrogate",
    json.dumps(message(content=None)).encode(): "needs `content`",
    json.dumps(message(content=[])).encode(): "needs `content`",
    json.dumps(message(tool_calls=[])).encode(): "`tool_calls` is not supported",
    json.dumps(message(content="an <image> here")).encode(): "may not hold <image>",
    json.dumps(message(content="word " * 2000)).encode(): "the prompt has 2",
    json.dumps(part(type="text", text=3)).encode(): "neither text nor image_url",
    json.dumps(part(type="video_url", video_url={"url": "file:///x"})).encode(): "neither text nor image_url",
    json.dumps(part(type="image_url")).encode(): "an image_url part is",
    json.dumps(part(type="image_url", image_url={"url": "data:image/png;base64,!!"})).encode(): "base64",
    json.dumps(part(type="image_url", image_url={"url": "data:image/png"})).encode(): "comma",
    json.dumps(part(type="image_url", image_url={"url": data_url(b"no image")})).encode(): "cannot be read",
    json.dumps(part(type="image_url", image_url={"url": data_url(png(IMAGES[0])[:-90])})).encode(): "cannot be read",
    json.dumps(part(type="image_url", image_url={"url": "ftp://host/x.png"})).encode(): "files are not read",
    json.dumps(part(type="image_url", image_url={"url": "/etc/hostname"})).encode(): "files are not read",
    json.dumps(message() | {"model": "other"}).encode(): "this server has `micro` alone",
    json.dumps(message() | {"n": 2}).encode(): "`n` is not supported",
    json.dumps(message() | {"logprobs": True}).encode(): "`logprobs` is not supported",
    json.dumps(message() | {"generation_config": "{}"}).encode(): "`generation_config` is not supported",
    json.dumps(message() | {"chat_template_kwargs": {"chat_template": "x"}}).encode(): "`chat_template_kwargs` is not",
    json.dumps(message() | {"max_tokens": 10**9}).encode(): "`max_tokens` is",
    json.dumps(message() | {"max_completion_tokens": "4"}).encode(): "`max_completion_tokens` is",
    json.dumps(message() | {"temperature": float("nan")}).encode(): "`temperature` is",
    json.dumps(message() | {"temperature": -1}).encode(): "`temperature` is",
    json.dumps(message() | {"top_p": 0}).encode(): "`top_p` is",
    json.dumps(message() | {"seed": 2**80}).encode(): "`seed` is",
    json.dumps(message() | {"stop": [""]}).encode(): "`stop` must be",
    json.dumps(message() | {"stop": "red"}).encode(): "`stop`: transformers can't look for stop strings",
    json.dumps(message() | {"stream": "yes"}).encode(): "`stream` must be",
}


def test_malformed_requests_get_one_sentence(client):
    before = counters(client)
    for body, sentence in MALFORMED.items():
        response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error"), (body[:80], error)
        assert sentence in error["message"], body[:80]
        assert "\n" not in error["message"]
    failed = counters(client)["lit_prune_request_errors_total"] - before["lit_prune_request_errors_total"]
    assert failed == len(MALFORMED)


# -- limits ---------------------------------------------------------------------------------------------------------
def test_sizes_and_numbers_are_limited(vlm):
    with running(vlm, request_mb=0.2, images=2, megapixels=1, new_tokens=3) as client:
        assert client.post(CHAT, json=asked("x", user="u" * 300_000)).status_code == 413
        chunked = client.post(CHAT, content=(b" " * 1000 for _ in range(300)))
        assert (chunked.status_code, chunked.json()["error"]["message"]) == (413, "the request is larger than 0.2 MB")
        small = data_url(png(IMAGES[0]))
        refused = {
            "more than 2 images": asked("x", small, small, small, max_tokens=1),
            "decompression bomb": asked("x", data_url(png(Image.new("1", (1200, 1000)))), max_tokens=1),
            "`max_tokens` is 4": asked("x"),
        }
        for sentence, body in refused.items():
            response = client.post(CHAT, json=body)
            assert response.status_code == 400
            assert sentence in response.json()["error"]["message"]
        half = data_url(png(Image.new("1", (800, 800))))
        response = client.post(CHAT, json=asked("x", half, half, max_tokens=1))  # each fits, both don't
        assert "decompression bomb" in response.json()["error"]["message"]


def test_too_many_requests_are_turned_away_and_slow_ones_dropped(vlm):
    with running(vlm, requests=1, seconds=0.5) as client:
        slow = socket.create_connection((client.base_url.host, client.base_url.port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
        slow.sendall(head.encode() + b"{")
        time.sleep(0.1)
        response = client.post(CHAT, json=BODIES[0])
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        slow.settimeout(20)
        assert b" 408 " in slow.recv(4096)
        slow.close()
        assert client.post(CHAT, json=BODIES[0]).status_code == 200


# -- images from elsewhere ------------------------------------------------------------------------------------------
PRIVATE = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
PRIVATE += ["224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1"]
PRIVATE += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"]


def test_addresses_of_private_networks_are_known():
    assert [address for address in PRIVATE if web.is_public(address)] == []
    assert all(map(web.is_public, ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"]))


class Site(BaseHTTPRequestHandler):
    """Serves one picture in several ways."""

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest if "://" in rest else f"/{rest}")
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        self.end_headers()
        try:
            for piece in {"slow": [b"x"] * 60, "large": [b"x" * 65536] * 100}.get(kind, [png(IMAGES[0])]):
                self.wfile.write(piece)
                time.sleep(0.1 if kind == "slow" else 0)
        except OSError:  # the other side has had enough
            pass

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_private_addresses_are_not_read_also_behind_names_and_redirects(site, monkeypatch):
    def fetched(url: str) -> bytes:
        return web.download(url, 100_000, 5)

    port = site.partition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]"):
        with pytest.raises(LitPruneError, match=r"private network|can't be resolved"):
            fetched(f"http://{host}:{port}/picture")
    # A name with a public and a private address, as in DNS rebinding.
    public, private = (((), (), (), "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1"))
    with monkeypatch.context() as patch:
        patch.setattr(web.socket, "getaddrinfo", lambda *_, **__: [public, private])
        with pytest.raises(LitPruneError, match="private network"):
            fetched("http://rebind.example/picture")
    # A public site that redirects to a private one: 127.0.0.1 stands for the public one.
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
    assert fetched(f"http://{site}/to/picture") == png(IMAGES[0])
    with pytest.raises(LitPruneError, match=r"127\.0\.0\.2 is an address of a private network"):
        fetched(f"http://{site}/to/http://127.0.0.2:{port}/picture")
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(LitPruneError, match="data:, http: and https:"):
            fetched(f"http://{site}/to/{target}")
    with pytest.raises(LitPruneError, match="data:, http: and https:"):
        fetched("http://user:secret@127.0.0.1/")


def test_downloads_are_limited_in_size_time_and_redirects(site):
    def fetched(path: str, seconds: float = 5) -> bytes:
        return web.download(f"http://{site}/{path}", 100_000, seconds, private=True)

    assert fetched("to/to/to/picture") == png(IMAGES[0])
    for path, sentence in (("to/to/to/to/picture", "redirects"), ("missing", "status 404"), ("large", "100,000 bytes")):
        with pytest.raises(LitPruneError, match=sentence):
            fetched(path)
    start = time.monotonic()
    with pytest.raises(LitPruneError, match="can't be reached"):  # a byte now and then keeps no connection open
        fetched("slow", seconds=0.5)
    assert time.monotonic() - start < 3


def test_images_from_the_web_and_from_a_folder_where_allowed(vlm, client, site, tmp_path):
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "0.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "secret.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "shown" / "link.png").symlink_to(tmp_path / "secret.png")
    expected = vlm.answer(IMAGES[0], QUESTIONS[0], max_new_tokens=4)

    def response(client: httpx.Client, url: str) -> Any:
        answer = client.post(CHAT, json=asked(QUESTIONS[0], url))
        return text_of(answer) if answer.status_code == 200 else answer.json()["error"]["message"]

    assert "private network" in response(client, f"http://{site}/picture")
    with running(vlm, urls="any", folder=tmp_path / "shown") as open_client:
        for url in (f"http://{site}/picture", "0.png", f"file://{tmp_path}/shown/0.png"):
            assert response(open_client, url) == expected
        for url in ("../secret.png", f"file://{tmp_path}/secret.png", "link.png", "file://host/0.png", "nothing.png"):
            assert response(open_client, url).startswith(("image", "image path")), url
    with running(vlm, urls="none") as closed:
        assert "http URLs are not read here" in response(closed, f"http://{site}/picture")


def arrived(client: httpx.Client) -> float:
    """Chat completions that a server has got so far."""
    return sum(v for name, v in counters(client).items() if name.startswith(("lit_prune_requests_total", IN_PROGRESS)))


# -- stopping -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_running_requests(vlm, number):
    """In this process and thread, as the command does it: what was sent before is answered, later connections fail."""
    server = Server(vlm, "micro", ImageSources("public", None, Limits()))
    waiting = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{waiting.getsockname()[1]}"
    answers = []

    def ask() -> None:
        client = httpx.Client(base_url=address, timeout=60, trust_env=False)
        with client, ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(client.post, CHAT, json=body) for body in BODIES * 2]
            while arrived(client) < len(sent):
                time.sleep(0.01)
            os.kill(os.getpid(), number)
            answers.extend(one.result().status_code for one in sent)

    before = signal.getsignal(number)
    asking = threading.Thread(target=ask)
    asking.start()
    server.run(waiting)
    asking.join(30)
    assert answers == [200] * 8
    assert signal.getsignal(number) is before
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", trust_env=False)


# -- load -----------------------------------------------------------------------------------------------------------
def leftovers(vlm: VLM) -> tuple[int, int]:
    """Hooks on the model, and live tensors."""
    gc.collect()
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in vlm.model.modules())
    return hooks, sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def settled(vlm: VLM) -> tuple[int, int]:
    """The least leftovers of half a second: an answer may arrive a moment before its generation is over."""
    counts = []
    for _ in range(5):
        time.sleep(0.1)
        counts.append(leftovers(vlm))
    return min(counts)


def mixed(number: int) -> tuple[bytes, int]:
    """A request, and the status that it gets: pictures of several sizes, streams, plain text, nonsense."""
    kind, size = number % 8, (40 + 31 * (number % 7), 60 + 17 * (number % 5))
    picture = data_url(png(IMAGES[number % 4].resize(size)))
    body = asked(QUESTIONS[number % 4], *([picture] * (kind % 4)), stream=bool(number % 3 == 0), max_tokens=1 + kind)
    if kind < 6:
        return json.dumps(body).encode(), 200
    return list(MALFORMED)[number % len(MALFORMED)], 400


LAST = (0, 1)  # one that is streamed and one that isn't: of each the server keeps the last until the next


def load(vlm: VLM, warming: int, count: int) -> None:
    with running(vlm) as client, ThreadPoolExecutor(16) as pool:

        def send(number: int) -> bool:
            content, status = mixed(number)
            response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            return response.status_code == status and (status != 200 or bool(text_of(response)) is not None)

        assert all(pool.map(send, range(warming)))  # lazy imports, caches, threads
        assert all(map(send, LAST))
        before, resident = settled(vlm), psutil.Process().memory_info().rss
        assert all(pool.map(send, range(count)))
        assert all(map(send, LAST))
        assert settled(vlm) == before
        after = counters(client)  # a request counts once its answer has been sent
        assert warming < 100 or psutil.Process().memory_info().rss - resident < 60e6  # arenas of 16 threads fill first
        good = sum(mixed(number)[1] == 200 for number in [*range(warming), *LAST, *range(count), *LAST])
        assert after['lit_prune_requests_total{code="200"}'] == good
        assert after['lit_prune_requests_total{code="400"}'] == warming + count + 2 * len(LAST) - good
        assert after["lit_prune_requests_in_progress"] == 0


def test_thirty_mixed_requests_leave_nothing_behind(vlm):
    load(vlm, 8, 30)


@pytest.mark.slow
def test_five_hundred_mixed_requests_leave_nothing_behind(vlm):
    load(vlm, 200, 500)


# -- the command ----------------------------------------------------------------------------------------------------
def test_command_serves_and_refuses_what_it_cannot_have(capsys, tmp_path):
    """Errors show before the model is loaded; then one run, ended by a signal as soon as it answers."""

    def fails(*args: str) -> str:
        with pytest.raises(SystemExit):
            main(["serve", *args])
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"can't serve at 127.0.0.1 port {port}" in fails("divprune", "--keep", "16", "--port", port)
        assert "--image-folder" in fails("divprune", "--keep", "16", "--image-folder", str(tmp_path / "none"))
        assert "names no budget" in fails("divprune")
        assert "--limits.images is 0" in fails("divprune", "--limits.images", "0")

        def ask() -> None:
            while not (said := capsys.readouterr().err).startswith("DivPrune on micro at http://127.0.0.1:"):
                time.sleep(0.05)
            answer = httpx.post(f"{said.split()[4]}/chat/completions", json=BODIES[0], timeout=60, trust_env=False)
            answered.append(answer.status_code)
            os.kill(os.getpid(), signal.SIGTERM)

        answered = []
        asking = threading.Thread(target=ask)
        asking.start()
        main(["serve", "divprune", "--keep", "16", "--port", "0"])
        asking.join(30)
    assert answered == [200]
    assert "stopped" in capsys.readouterr().err


def test_missing_packages_are_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("lit_prune.commands.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(SystemExit):
        main(["serve", "divprune", "--keep", "16"])
    assert "serving needs uvicorn: pip install -e '.[serve]'" in capsys.readouterr().err
