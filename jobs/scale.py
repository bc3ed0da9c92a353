"""Time of the selection alone, and the largest tensor it makes, against the number of visual tokens, for every method.

python jobs/scale.py                                        # all methods of configs/pruners, 144 to 16,384 tokens
python jobs/scale.py --methods divprune rcp --budget 256 --json runs/scale.json --plot runs/scale.png

Inputs are random, of LLaVA-1.5's widths: 1,024 in the vision tower, 4,096 in the decoder unless `--width` is less:
noise, the worst case for methods that skip what can't be picked, or with `--smooth` a field in which neighbours are
similar, as in images. A method's stages in the tower and its first one in the decoder are timed apart, in processor
time. `largest` is the number of elements of the largest tensor that any operation returned, divided by the inputs'
tokens: where it grows with the number of tokens, something quadratic is materialised. Numbers of tokens are squares,
since tower methods see a grid.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from lit_prune.pruners.base import Context, Dims, Pruner, VisionContext, VisionPruner
from lit_prune.vlm import plugin_from_yaml

ROOT = Path(__file__).parents[1]
TOKENS = (144, 576, 2304, 9216, 16384)
TOWER_WIDTH, WORDS, DEPTH = 1024, 32, 32


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation makes; views are of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and look at what it returns."""
        found = function(*args, **(kwargs or {}))
        if not function.is_view and "expand" not in str(function):
            parts = found if isinstance(found, tuple | list) else (found,)
            self.elements = max([self.elements, *(part.numel() for part in parts if isinstance(part, Tensor))])
        return found


def states(tokens: int, width: int, smooth: bool, draw: torch.Generator) -> Tensor:
    """States of the tokens of one image: noise, or a field that varies over four patches with a fifth of noise."""
    noise = torch.randn(1, tokens, width, generator=draw)
    if not smooth:
        return noise
    side = round(tokens**0.5)
    coarse = torch.randn(1, width, side // 4, side // 4, generator=draw)
    field = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return field.flatten(2).transpose(1, 2) + 0.2 * noise


@lru_cache(maxsize=1)
def decoder_context(tokens: int, budget: int, width: int, smooth: bool) -> Context:
    """A stage of the decoder that sees all visual tokens of one sample."""
    draw = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw)

    alive = torch.ones(1, tokens, dtype=torch.bool)
    return Context(
        stage=0,
        visual=states(tokens, width, smooth, draw),
        alive=alive,
        ordinal=torch.arange(tokens)[None],
        text=random(1, WORDS, width),
        text_mask=torch.ones(1, WORDS, dtype=torch.bool),
        visual_embeds=states(tokens, width, smooth, draw),
        text_embeds=random(1, WORDS, width),
        attention=random(1, tokens).softmax(-1),
        count=torch.tensor([budget]),
        total=torch.tensor([tokens]),
        seed=torch.tensor([1]),
        hints={"regions": torch.rand(1, 2, tokens, generator=draw)},
        states=random(1, tokens, width),
        visual_keys=random(1, tokens, width),
        text_keys=random(1, WORDS, width),
        row_attention=random(1, WORDS, tokens).softmax(-1),
    )


@lru_cache(maxsize=1)
def tower_context(tokens: int, budget: int, smooth: bool) -> VisionContext:
    """A stage of the tower that sees all patches of one image."""
    draw = torch.Generator().manual_seed(0)
    own, keys, values = (states(tokens, TOWER_WIDTH, smooth, draw) for _ in range(3))
    return VisionContext(
        stage=0,
        states=own,
        keys=keys,
        values=values,
        attention=torch.rand(1, tokens, generator=draw).softmax(-1),
        alive=torch.ones(1, tokens, dtype=torch.bool),
        ordinal=torch.arange(tokens)[None],
        count=torch.tensor([budget]),
        side=round(tokens**0.5),
        heads=16,
    )


def selections(path: Path, tokens: int, budget: int, width: int, smooth: bool) -> dict[str, Callable[[], object]]:
    """The selections of one method by the place where it runs."""
    plugin = plugin_from_yaml(path)
    plugin.build(Dims(width, DEPTH, tokens), [])
    found: dict[str, Callable[[], object]] = {}
    method = plugin.pruner
    if isinstance(method.tower, VisionPruner):
        seen = tower_context(tokens, budget, smooth)
        found["tower"] = lambda: method.tower.prune_vision(replace(seen, memory={}))
    first = method.walk(DEPTH)[0].pruner
    if isinstance(first, Pruner) and type(first).prune is not None:
        context = decoder_context(tokens, budget, width, smooth)
        found["decoder"] = lambda: first.prune(context)
    return found


@torch.no_grad()
def measure(run: Callable[[], object], tokens: int, repeats: int) -> dict[str, float]:
    """Best time of some runs in milliseconds, and the largest tensor in elements per visual token."""
    with Largest() as seen:
        run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return {"ms": 1e3 * min(times), "largest": seen.elements / tokens}


def table(rows: list[dict]) -> str:
    """Markdown: a row per method and place, times and largest tensors by number of tokens."""
    sizes = sorted({row["tokens"] for row in rows})
    lines = ["| method | place | " + " | ".join(f"{n:,}: ms (largest)" for n in sizes) + " |"]
    lines.append("|---|---|" + "---:|" * len(sizes))
    for name, place in dict.fromkeys((row["method"], row["place"]) for row in rows):
        mine = {row["tokens"]: row for row in rows if (row["method"], row["place"]) == (name, place)}
        cells = (f"{mine[n]['ms']:.1f} ({mine[n]['largest']:,.0f})" if n in mine else "" for n in sizes)
        lines.append(f"| {name} | {place} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], file: Path) -> None:
    """Time against tokens on logarithmic axes, a line per method and place."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, place in dict.fromkeys((row["method"], row["place"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["place"]) == (name, place)]
        axes.loglog([row["tokens"] for row in mine], [row["ms"] for row in mine], marker="o", label=f"{name}, {place}")
    axes.set(xlabel="visual tokens", ylabel="ms of the selection")
    axes.legend(fontsize="xx-small", ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, print a table, and write what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names in configs/pruners (default: all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="numbers of visual tokens, squares")
    parser.add_argument("--budget", type=int, default=64, help="tokens kept (default 64)")
    parser.add_argument("--width", type=int, default=4096, help="of the decoder's states (default 4096)")
    parser.add_argument("--smooth", action="store_true", help="similar neighbours in place of noise")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the best counts (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="picture of times against tokens")
    options = parser.parse_args()
    if any(round(n**0.5) ** 2 != n for n in options.tokens):
        parser.error("--tokens: squares, such as 576 or 16384")
    paths = sorted((ROOT / "configs/pruners").glob("*.yaml"))
    paths = [path for path in paths if not options.methods or path.stem in options.methods]
    if missing := set(options.methods or ()) - {path.stem for path in paths}:
        parser.error(f"--methods: configs/pruners has no {', '.join(sorted(missing))}")
    rows: list[dict] = []
    for tokens in tqdm(options.tokens, "tokens"):
        for path in tqdm(paths, f"{tokens:,}", leave=False):
            for place, run in selections(path, tokens, options.budget, options.width, options.smooth).items():
                figures = measure(run, tokens, options.repeats)
                rows.append({"method": path.stem, "place": place, "tokens": tokens, **figures})
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1, default=str))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
