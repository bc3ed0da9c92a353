"""Serve a pruned model with OpenAI's chat API."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lit_prune.commands._support import console
from lit_prune.commands._support.serving.limits import Limits
from lit_prune.errors import LitPruneError, check_number, extra

LOCAL = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client")


def run(
    pruner: str | None = None,
    model: str | None = None,
    keep: Any = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    image_urls: Literal["none", "public", "any"] = "public",
    image_folder: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
) -> None:
    """Serve a pruned model on transformers' own OpenAI-compatible server.

    POST /v1/chat/completions answers, streaming or not; /v1/models, /health and /metrics (Prometheus) are the other
    addresses. Requests may come at once; they are answered one after the other. SIGTERM or Ctrl-C stops it: running
    requests are finished first. There are no accounts: whoever reaches the port may ask. Needs the extra serve.

    Args:
        pruner: Shipped method (`lit-prune configs list pruners`), YAML file, plug-in folder or hub id, e.g. --pruner
            fastv; "full" is the plain model. By default the plug-in of --model.
        model: "micro", a model folder, or a hub id, e.g. --model llava-hf/llava-1.5-7b-hf; or a plug-in's folder or hub
            id, which brings its base model. By default the base model of the plug-in, or micro.
        keep: Budget, visual tokens averaged over the decoder layers, e.g. --keep 16 or --keep 11.1%; by default the
            plug-in's own.
        host: Address to serve at. Any but this machine's own lets others in, e.g. --host 0.0.0.0.
        port: Port to serve at, e.g. --port 8001; 0 takes a free one.
        name: Of the model for clients, e.g. --name llava; by default its hub id, or its folder's name.
        image_urls: Web addresses that images may be read from: none; public, those of the public internet; or any,
            those of private networks too. Images in data URLs are always read.
        image_folder: Folder that image files may be read from, by file: URLs or relative paths; by default none.
        limits: Limits on requests.
        dtype: Of the weights, e.g. --dtype bfloat16; auto is what the checkpoint says.
        device: E.g. --device cuda:1; auto is the GPU if there is one.

    Examples:
        lit-prune serve divprune --keep 16
        lit-prune serve runs/try/plugin --port 8001 --image-urls none
        lit-prune serve fastv --model llava-hf/llava-1.5-7b-hf --keep 64 --host 0.0.0.0 --limits.new_tokens 256
    """
    check_number("--port", port, least=0, most=65535, whole=True)
    if pruner is None and model is None:
        raise LitPruneError("give a method or a plug-in to serve, e.g. lit-prune serve divprune --keep 16")
    _check_packages()
    if image_folder is not None and not image_folder.is_dir():
        raise LitPruneError(f"--image-folder {image_folder} is no folder")
    # with PyTorch, which --help does without
    from lit_prune.commands._support.inputs import Choice, attach, load_model, own_choice
    from lit_prune.commands._support.serving.images import ImageSources
    from lit_prune.commands._support.serving.server import Server, listen

    choice = None if pruner is None else Choice.of(pruner, keep)
    model = model or (choice.plugin.base if choice else None) or "micro"
    listening = listen(host, port)  # one that is taken shows before the model is loaded
    vlm = load_model(model, dtype, device)
    if (choice := choice or own_choice(vlm, model, keep)) is None:
        raise LitPruneError(f"{model} is no plug-in: give --pruner too (full serves the plain model)")
    title = attach(vlm, choice)
    name = name or (Path(model).name if Path(model).expanduser().is_dir() else model)
    server = Server(vlm, name, ImageSources(image_urls, image_folder, limits))
    if host not in LOCAL:
        console.say(f"note: whoever reaches {host} can use this model")
    address = f"[{host}]" if ":" in host else host
    console.say(f"{title} on {name} at http://{address}:{listening.getsockname()[1]}/v1 (Ctrl-C ends it)")
    server.run(listening)
    console.say("stopped")


def _check_packages() -> None:
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise LitPruneError(f"serving needs {', '.join(missing)}: {extra('serve')}")
