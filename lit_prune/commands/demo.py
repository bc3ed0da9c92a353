"""Look at pruning live in a browser: upload a picture, ask, compare the answers."""

from importlib.util import find_spec
from typing import Any, Literal

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError, check_number

LOCAL = ("127.0.0.1", "localhost", "::1")


def run(
    pruner: list[str] | None = None,
    keep: Any = None,
    model: str = "micro",
    max_new_tokens: int = 64,
    host: str = "127.0.0.1",
    port: int = 7860,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
) -> None:
    """Serve a page that answers questions about pictures, in full and pruned, side by side.

    It shows the visual tokens that are kept at every stage, and streams both answers, one after the other, with the
    time to first token and tokens per second. Everything runs on this machine: no link is shared, and no data are
    sent. On micro there are pictures to try. Needs gradio: pip install -e ".[demo]". Ctrl-C ends it.

    Args:
        pruner: Methods to choose from, shipped ones, YAML files or plug-in folders, e.g. --pruner fastv
            runs/try/plugin. Default: the shipped ones that need no training.
        keep: Budget to begin with, visual tokens averaged over the decoder layers, e.g. --keep 16 or 11.1%.
        model: "micro", a model folder, or a hub id, e.g. --model llava-hf/llava-1.5-7b-hf.
        max_new_tokens: Longest answer, e.g. --max-new-tokens 256.
        host: Address to serve at. Any but this machine's own lets others in, e.g. --host 0.0.0.0.
        port: Port to serve at, e.g. --port 8000; 0 takes a free one.
        dtype: Of the weights, e.g. --dtype bfloat16; auto is what the checkpoint says.
        device: E.g. --device cuda:1; auto is the GPU if there is one.

    Examples:
        lit-prune demo
        lit-prune demo --pruner divprune runs/try/plugin --keep 16
        lit-prune demo --model llava-hf/llava-1.5-7b-hf --pruner fastv visionzip --keep 64
    """
    check_number("--max-new-tokens", max_new_tokens, least=1, whole=True)
    check_number("--port", port, least=0, most=65535, whole=True)
    if find_spec("gradio") is None:
        raise LitPruneError('the demo needs gradio, which is not installed: pip install -e ".[demo]"')
    from lit_prune.commands._support.demo_page import Demo  # with PyTorch and gradio, which --help does without
    from lit_prune.commands._support.inputs import load_model
    from lit_prune.plugin.methods import as_plugin

    for path in pruner or []:
        as_plugin(path)  # a wrong one shows before the model is loaded
    demo = Demo(load_model(model, dtype, device), pruner, keep, max_new_tokens)
    address = demo.launch(host, port)
    if host not in LOCAL:
        console.say(f"note: whoever reaches {host} can use this page")
    console.say(f"demo of {model} at {address} (Ctrl-C ends it)")
    demo.page.block_thread()
