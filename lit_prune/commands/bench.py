"""Time several methods beside the full model: first token, prefill, decoding, memory."""

import datetime
import json as json_format
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.commands._support.inputs import Dtype, image_pixels, load_model
from lit_prune.commands._support.outputs import check_file, check_picture
from lit_prune.cost.sizes import USUAL
from lit_prune.errors import LitPruneError, check_number, check_numbers
from lit_prune.evaluation.timing import NOISY, Benchmark, Method, clock_for, noisy
from lit_prune.loading import config_of
from lit_prune.ops.budget import Budget, format_budget, parse_budget
from lit_prune.plugin.methods import FULL, MethodText

Row = dict[str, Any]
MOST_THREADS = 4096


def run(
    methods: list[str],
    model: str | dict[str, Any] = "micro",
    random_weights: bool = False,
    keep: Any = None,
    batch_sizes: list[int] = [1, 4],  # noqa: B006
    image_size: list[int] | None = None,
    text_tokens: int = 64,
    new_tokens: int = 16,
    repeats: int = 7,
    warmup: int = 1,
    time_limit: float | None = None,
    clock: Literal["wall", "cpu"] = "wall",
    threads: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time the full model and methods in turn, on one set of weights, with random prompts of one image each.

    Args:
        methods: `full`, a shipped method, a YAML file, or a plug-in folder, each as PATH or NAME=PATH, with its own
            budget as PATH@BUDGET: an average such as @64 or @11.1%, or counts by layer such as @2:192,4:64,8:16.
        model: "micro", a model folder or a hub id; in a file also the fields of a config.json, for random weights.
        random_weights: Build the model's shape with random weights, without a download: times need no right answers.
        keep: Budget of the methods that name none, visual tokens averaged over the decoder layers. Default: each
            plug-in's own.
        batch_sizes: Numbers of prompts at once.
        image_size: Height and width of the images in pixels, e.g. --image-size 672 1008, for models that cut an image
            into crops or take it in its own size. Default: 672 672.
        text_tokens: Text tokens of each prompt, beside the image's.
        new_tokens: Tokens answered in each request.
        repeats: Measured rounds; every round runs each method at each batch size once.
        warmup: Rounds before that, not measured.
        time_limit: Seconds after which to stop and report what is there.
        clock: wall, or cpu: processor time of one thread, for a machine that others use too. On CUDA wall is by events.
        threads: Threads of PyTorch on the CPU. Default: PyTorch's own.
        dtype: Of the weights.
        device: E.g. cuda:1; auto is the GPU if there is one.
        json: File for the table and what it was measured on.
        plot: Picture of speed-ups against FLOPs and of times against batch sizes, e.g. bench.png.

    Examples:
        lit-prune bench --methods full fastv@16 divprune@16 --batch-sizes 1 --repeats 3
        lit-prune bench -c bench/cpu.yaml --json bench.json --plot bench.png
    """
    _check(batch_sizes, text_tokens, new_tokens, repeats, warmup, time_limit, threads)
    check_file("--json", json)
    check_picture("--plot", plot)
    pixels = image_pixels(image_size) or USUAL
    shared = None if keep is None else parse_budget(keep, "--keep")
    entrants = [_method(spec, shared) for spec in methods]
    if len({method.name for method in entrants}) < len(entrants):
        entrants = [_method(spec, shared, by_file=True) for spec in methods]
    with _threads(threads):
        described = isinstance(model, dict)
        vlm = load_model(
            config_of(model, "`model`") if described else model, dtype, device, random_weights or described
        )
        timer = clock_for(clock, vlm.model.device)
        bench = Benchmark(vlm, entrants, batch_sizes, text_tokens, new_tokens, timer, pixels)
        header = {**_header(bench, clock), "random_weights": random_weights or described}
        done = _loop(bench, repeats, warmup, time_limit)
    rows = bench.rows()
    if not rows:
        raise LitPruneError("nothing was measured: give a longer --time-limit, or smaller batch sizes")
    header["load_average_after"] = os.getloadavg()[0]
    header["notes"] = _notes(bench, rows, header, None if done else time_limit)
    if json is not None:
        _write(json, {"header": header, "rows": rows})
    if plot is not None:
        _plot(plot, rows, header)
    _print(rows, header)


def _check(
    batch_sizes: list[int],
    text_tokens: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
    time_limit: float | None,
    threads: int | None,
) -> None:
    """Numbers that nothing can be measured with, before a model is loaded."""
    check_numbers("--batch-sizes", batch_sizes, least=1, whole=True)
    check_number("--text-tokens", text_tokens, least=2, whole=True)
    check_number("--new-tokens", new_tokens, least=2, whole=True)
    check_number("--repeats", repeats, least=1, whole=True)
    check_number("--warmup", warmup, least=0, whole=True)
    check_number("--threads", threads, least=1, most=MOST_THREADS, whole=True)
    if time_limit is not None and not time_limit > 0:  # infinity is none
        raise LitPruneError(f"nothing was measured: --time-limit is {time_limit}, give some seconds")
    if not batch_sizes:
        raise LitPruneError("--batch-sizes: give at least one")


def _method(spec: str, keep: Budget | None, by_file: bool = False) -> Method:
    """A method as `MethodText` reads it; without a name the method's own, or its file's."""
    line = MethodText.parse(spec, "--methods")
    if len(line.paths) > 1:
        raise LitPruneError(
            f"--methods {spec}: several paths are runs of one method, which `lit-prune compare` averages"
        )
    if line.path == FULL:
        return Method(line.name or FULL)
    plugin = line.plugin()
    budget = line.keep or (plugin.keep if keep is None else keep)
    if budget is None:
        raise LitPruneError(
            f"{line.path} names no budget: give --keep, or {line.path}@BUDGET (64, or 2:64 for counts by layer)"
        )
    title = (not by_file and plugin.title) or Path(line.path).stem
    own = "" if line.keep is None else f" {format_budget(line.keep)}"
    return Method(line.name or f"{title}{own}", plugin, budget)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loop(bench: Benchmark, repeats: int, warmup: int, time_limit: float | None) -> bool:
    """Run it behind a bar that draws itself only between two measurements, never during one."""
    total = (repeats + warmup) * len(bench.batch_sizes) * len(bench.methods)
    with Progress(console=console.err, auto_refresh=False) as progress:
        task = progress.add_task(f"{len(bench.methods)} methods", total=total)
        return bench.run(repeats, warmup, time_limit, lambda: progress.update(task, advance=1, refresh=True))


def _header(bench: Benchmark, clock: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    device, dims = bench.vlm.model.device, bench.dims
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": bench.vlm.name,
        "layers": dims.depth,
        "width": dims.width,
        "visual_tokens": bench.visual,
        "text_tokens": bench.text_tokens,
        "new_tokens": bench.new_tokens,
        "dtype": str(bench.vlm.model.dtype).removeprefix("torch."),
        "attention": bench.vlm.model.config._attn_implementation,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "clock": "cuda events" if device.type == "cuda" else clock,
        "load_average_before": os.getloadavg()[0],
    }


def _cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _notes(bench: Benchmark, rows: list[Row], header: dict[str, Any], limit: float | None) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [f"{name} at batch {batch} did not fit into memory" for batch, name in bench.too_large]
    if limit is not None:
        notes.append(f"stopped by the time limit of {limit:g} s: n says how many rounds each row has")
    if noisy := [f"{row['method']} at batch {row['batch']}" for row in rows if row["noisy"]]:
        notes.append(
            f"too noisy to say (~: spread above {NOISY:.0%}, or a single round): {', '.join(noisy)}; "
            f"repeat more often, or on a quieter machine"
        )
    load = max(header["load_average_before"], header["load_average_after"])
    if load > header["cores"]:
        notes.append(f"the machine was busy: load average {load:.1f} on {header['cores']} cores")
    return notes


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_format.dumps(report, indent=1) + "\n", encoding="utf-8")


PREFILL = ("batch", "method", "prefill ms", "± %", "speed-up", "FLOPs", "eff. %", "over. %", "±", "n")
REQUEST = ("batch", "method", "TTFT ms", "gain", "ms/token", "gain", "tokens/s", "KV MB", "peak MB")


def _prefill_cells(row: Row) -> list[str]:
    """A row under `PREFILL`."""
    gains = [_number(row[key], 1, 2) for key in ("speedup", "flops_ratio")]
    shares = [_number(row[key], 100, 1) for key in ("efficiency", "overhead", "overhead_spread")]
    return [_time(row, "prefill_ms", "spread"), _number(row["spread"], 100, 1), *gains, *shares, str(row["n"])]


def _request_cells(row: Row) -> list[str]:
    """A row under `REQUEST`."""
    return [
        _time(row, "ttft_ms", "ttft_spread"),
        _number(row["ttft_speedup"], 1, 2),
        _time(row, "decode_ms_per_token", "decode_spread"),
        _number(row["decode_speedup"], 1, 2),
        f"{row['tokens_per_s']:.1f}",
        f"{row['kv_bytes'] / 1e6:.2f}",
        _number(row["peak_memory_bytes"], 1e-6, 0),
    ]


def _time(row: Row, time: str, spread: str) -> str:
    return f"{'~' if noisy(row[spread]) else ''}{row[time]:.1f}"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _title(header: dict[str, Any]) -> str:
    weights = ", random weights" if header["random_weights"] else ""
    return f"{header['model']} ({header['layers']} layers of width {header['width']}{weights})"


def _print(rows: list[Row], header: dict[str, Any]) -> None:
    """Two narrow tables: the prefill beside what its FLOPs promise, and whole requests."""
    console.out.print(
        f"{_title(header)}: {header['visual_tokens']} visual + {header['text_tokens']} text tokens, "
        f"{header['dtype']}, {header['machine']}, {header['threads']} thread(s), {header['clock']} time",
        markup=False,
        highlight=False,
    )
    for columns, cells in ((PREFILL, _prefill_cells), (REQUEST, _request_cells)):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            name = column == "method"
            table.add_column(column, justify="left" if name else "right", no_wrap=not name, min_width=14 * name)
        for row in rows:
            table.add_row(str(row["batch"]), row["method"], *cells(row))
        console.out.print(table)
    for note in header["notes"]:
        console.say(f"note: {note}")


def _plot(path: Path, rows: list[Row], header: dict[str, Any]) -> None:
    """Left: speed-up of the prefill against its FLOPs ratio. Right: prefill time per batch size."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 4.5), layout="constrained")
    gain, time = page.subplots(1, 2)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        time.plot([row["batch"] for row in mine], [row["prefill_ms"] for row in mine], marker="o", label=method)
        gains = [row for row in mine if row["speedup"] is not None and row["flops_ratio"] is not None]
        colour = time.lines[-1].get_color()
        gain.scatter([row["flops_ratio"] for row in gains], [row["speedup"] for row in gains], color=colour)
        for row in gains:
            gain.annotate(f"batch {row['batch']}", (row["flops_ratio"], row["speedup"]), fontsize=7)
    gain.axline((1, 1), slope=1, color="grey", linestyle="--", linewidth=1)
    gain.set(xlabel="FLOPs of the full prefill / FLOPs of the pruned one", ylabel="speed-up of the prefill")
    time.set(xlabel="batch size", ylabel=f"prefill, ms ({header['clock']} time)", xscale="log", yscale="log")
    batches = sorted({row["batch"] for row in rows})
    time.set_xticks(batches, [str(batch) for batch in batches])
    time.legend(fontsize=8)
    page.suptitle(f"{_title(header)}, {header['machine']}, {header['date'][:10]}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=150)
