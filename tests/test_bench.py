"""`lit-prune bench`: every field against its definition, the order of a round, limits; never how fast it is."""

import inspect
import itertools
import json
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from tiny import DEPTH, VISUAL

from lit_prune import cli
from lit_prune.commands import bench
from lit_prune.cost.flops import decoder_layer
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.timing.benchmark import Benchmark, Method
from lit_prune.evaluation.timing.clocks import clock_for, cpu_clock, noisy, spread, wall_clock
from lit_prune.evaluation.timing.prompts import decode, prefill, random_prompt
from lit_prune.host.cut import cut_to
from lit_prune.host.parts import find
from lit_prune.loading import config_of
from lit_prune.ops.budget import average
from lit_prune.plugin import Plugin
from lit_prune.vlm import VLM, load, plugin_from_yaml

ROOT = Path(__file__).parent.parent
TEXT, NEW, BATCHES = 10, 3, [1, 3]
SCHEDULE = {1: 20, 3: 9, 5: 4}
SINGLE, SEVERAL = "FastV 2:8", "RCP 1:20 3:9 5:4"
FIELDS = {
    "method": str, "keep": int | str | dict | None, "batch": int, "prefill_ms": float, "ttft_ms": float,
    "decode_ms_per_token": float, "tokens_per_s": float, "speedup": float, "flops_ratio": float, "efficiency": float,
    "ttft_speedup": float, "decode_speedup": float, "overhead": float | None, "overhead_spread": float | None,
    "flops": float, "kv_bytes": int, "peak_memory_bytes": int | None, "avg_visual_tokens": float, "kept": dict,
    "spread": float | None, "ttft_spread": float | None, "decode_spread": float | None, "noisy": bool, "n": int,
}  # fmt: skip


def fastv() -> Method:
    return Method(SINGLE, plugin_from_yaml(ROOT / "configs" / "bench" / "pruners" / "fastv.yaml"), {2: 8})


def several() -> Method:
    return Method(SEVERAL, Plugin(tiny.small_rcp(), tiny.small_repair()).eval(), SCHEDULE)


@pytest.fixture
def made(tiny_model) -> Benchmark:
    vlm = VLM(tiny_model, None, "tiny")
    return Benchmark(vlm, [Method("full"), fastv(), several()], BATCHES, TEXT, NEW, cpu_clock)


@pytest.fixture(scope="module")
def model_fields() -> dict:
    """The tiny model as a bench file describes it."""
    return tiny.build_model().config.to_dict()


@pytest.fixture
def file(tmp_path, model_fields) -> Path:
    path = tmp_path / "bench.yaml"
    methods = ["full", "FastV=configs/bench/pruners/fastv.yaml@2:8"]
    options = {"model": model_fields, "methods": methods, "batch_sizes": [1, 2], "text_tokens": TEXT, "new_tokens": NEW}
    options |= {"repeats": 2, "threads": torch.get_num_threads(), "device": "cpu"}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(options))))
    return path


def run(*args: object) -> None:
    cli.main(["bench", *map(str, args)])


# -- what is measured -----------------------------------------------------------------------------------------------
def test_rows(made):
    assert made.run(repeats=3, warmup=1)
    rows = made.rows()
    assert [(row["batch"], row["method"]) for row in rows] == list(
        itertools.product(BATCHES, ["full", SINGLE, SEVERAL])
    )
    for row in rows:
        assert set(row) == set(FIELDS)
        assert all(isinstance(row[name], kind) for name, kind in FIELDS.items())
        assert row["n"] == 3
        full = next(other for other in rows if other["method"] == "full" and other["batch"] == row["batch"])
        assert row["speedup"] == full["prefill_ms"] / row["prefill_ms"]
        assert row["ttft_speedup"] == full["ttft_ms"] / row["ttft_ms"]
        assert row["decode_speedup"] == pytest.approx(full["decode_ms_per_token"] / row["decode_ms_per_token"])
        assert row["flops_ratio"] == full["flops"] / row["flops"]
        assert row["efficiency"] == row["speedup"] / row["flops_ratio"]
        seconds = (row["ttft_ms"] + (NEW - 1) * row["decode_ms_per_token"]) / 1e3
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * NEW / seconds)
        assert (row["overhead"] is None) == (row["method"] == "full")
        assert row["peak_memory_bytes"] is None, "PyTorch counts no peak on the CPU"


def test_times_are_those_of_the_clock(tiny_model):
    """A clock that counts its calls: medians, spreads and shares are exactly computable."""
    calls = itertools.count(1)
    made = Benchmark(VLM(tiny_model, None), [fastv()], [1], TEXT, NEW, lambda work: (float(next(calls)), work()))
    made.run(repeats=3, warmup=0)
    full, pruned = made.rows()
    # Round 0: full prefill 1, first 2, decode 3; FastV prefill 4, first 5, decode 6, cut 7. Round 1 begins with FastV.
    assert made.times[1, "full"].prefill == [1, 12, 15]
    assert made.times[1, SINGLE].prefill == [4, 8, 18]
    assert made.times[1, SINGLE].cut == [7, 11, 21]
    assert full["prefill_ms"] == 12_000
    assert (pruned["prefill_ms"], pruned["ttft_ms"], pruned["decode_ms_per_token"]) == (8_000, 9_000, 5_000)
    assert pruned["spread"] == (13 - 6) / 8
    assert pruned["overhead"] == 1 - 11 / 8, "the median of 1 - 7/4, 1 - 11/8 and 1 - 21/18"
    assert pruned["overhead_spread"] == pytest.approx((7 / 4 - 21 / 18) / 2), "quartiles lie half-way to the ends"
    assert pruned["noisy"]


def test_flops_and_tokens_are_the_schedules(made):
    made.run(repeats=1, warmup=0)
    size, head = made.vlm.size, 2 * tiny.WIDTH * tiny.VOCABULARY
    for row in made.rows():
        schedule = {"full": {}, SINGLE: {2: 8}, SEVERAL: SCHEDULE}[row["method"]]
        assert row["kept"] == schedule
        assert row["avg_visual_tokens"] == average(schedule, VISUAL, DEPTH)
        lengths = lengths_of(schedule)
        assert made.ran[row["batch"], row["method"]].lengths == lengths
        counts = [torch.tensor([n]) for n in lengths]
        decoder = sum(decoder_layer(size, n, n).item() for n in counts) * row["batch"]
        extra = row["flops"] - decoder - head * row["batch"]
        assert extra == 0 if row["method"] == "full" else 0 < extra < 0.2 * decoder


def lengths_of(schedule: dict[int, int]) -> list[int]:
    now, lengths = VISUAL, []
    for layer in range(DEPTH):
        now = schedule.get(layer, now)
        lengths.append(now + TEXT)
    return lengths


def test_cache_bytes_are_the_schedules_arithmetic(made):
    """Keys and values of 2 heads of 16 float32 numbers for every token at every layer."""
    made.run(repeats=1, warmup=0)
    for row in made.rows():
        schedule = {"full": {}, SINGLE: {2: 8}, SEVERAL: SCHEDULE}[row["method"]]
        assert row["kv_bytes"] == row["batch"] * sum(lengths_of(schedule)) * 2 * 2 * 16 * 4


@pytest.mark.parametrize("schedule", [SCHEDULE, {0: 9}], ids=["three stages", "before the decoder"])
def test_cut_model_runs_at_the_given_lengths(tiny_model, schedule):
    """Lengths in its cache, and the numbers of a shorter sequence: after layer 0 only the last columns count."""
    prompt, lengths = random_prompt(VLM(tiny_model, None), 2, TEXT), lengths_of(schedule)
    with torch.no_grad():
        with cut_to(tiny_model, lengths, VISUAL + TEXT):
            _, cache = prefill(tiny_model, prompt.features)
        whole, _ = prefill(tiny_model, prompt.features)
        with cut_to(tiny_model, lengths_of({}), VISUAL + TEXT):
            uncut, _ = prefill(tiny_model, prompt.features)
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths
    assert torch.equal(whole, uncut)
    assert not any(layer._forward_pre_hooks for layer in tiny_model.get_decoder().layers)


def test_decoding_goes_on_from_the_cache(made):
    """The tokens of a measured request are those of `generate`."""
    prompt = random_prompt(made.vlm, 2, TEXT)
    with torch.no_grad(), made._attached(made.methods[2]):
        token, cache = prefill(made.vlm.model, prompt.pixels)
        last = decode(made.vlm.model, token, cache, 4)
        mask = torch.ones_like(prompt.pixels["input_ids"])  # else random ids are taken for padding
        whole = made.vlm.model.generate(**prompt.pixels, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(last[:, 0], whole[:, -1])


def test_methods_of_the_tower_make_their_own_features(tiny_model):
    """VisionZip drops patches inside the tower, so the features of the plain model would not do."""
    plugin = plugin_from_yaml(ROOT / "configs" / "pruners" / "visionzip.yaml")
    made = Benchmark(VLM(tiny_model, None), [Method("VisionZip", plugin, 9)], [2], TEXT, NEW, cpu_clock)
    assert made.run(repeats=1, warmup=0)
    row = made.rows()[1]
    assert row["avg_visual_tokens"] == pytest.approx(9, abs=0.5)
    assert row["flops_ratio"] > 1


def test_prompts(tiny_model):
    """As many tokens as asked, none of the text an image token; features are those of the pixels."""
    prompt = random_prompt(VLM(tiny_model, None), 3, TEXT)
    ids = prompt.pixels["input_ids"]
    assert ids.shape == (3, VISUAL + TEXT)
    assert ((ids == tiny.IMAGE).sum(1) == VISUAL).all()
    assert "pixel_values" in prompt.pixels
    assert "pixel_values" not in prompt.features
    with torch.no_grad():
        logits = [tiny_model(**inputs).logits for inputs in (prompt.pixels, prompt.features)]
    assert torch.equal(*logits)


# -- how it is measured ---------------------------------------------------------------------------------------------
def test_rounds_interleave_and_rotate(made):
    names = ["full", SINGLE, SEVERAL]
    for turn in range(4):
        shift = turn % 3
        expected = list(itertools.product(BATCHES, names[shift:] + names[:shift]))
        assert [(batch, method.name) for batch, method in made.order(turn)] == expected


def test_measurements_come_in_that_order(made, monkeypatch):
    seen = []
    monkeypatch.setattr(made, "_measure", lambda batch, method, times: seen.append((batch, method.name)))
    made.run(repeats=2, warmup=1)
    assert seen == [(b, m.name) for turn in (-1, 0, 1) for b, m in made.order(turn)]


def test_model_is_left_plain_and_the_full_rows_run_without_hooks(made, monkeypatch):
    layers, plain = made.vlm.model.get_decoder().layers, []
    measure = Benchmark._measure

    def spy(self, batch, method, times):
        measure(self, batch, method, times)
        plain.append(not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers))

    monkeypatch.setattr(Benchmark, "_measure", spy)
    hooked = []
    clock = made.clock
    made.clock = lambda work: (hooked.append(bool(layers[0]._forward_hooks)), clock(work))[1]
    made.run(repeats=1, warmup=0)
    assert all(plain)
    assert made.vlm.host is None
    per_batch = [False] * 3 + [True] * 3 + [False] + [True] * 3 + [False]  # full; two methods with their lower bounds
    assert hooked == per_batch * len(BATCHES)


def test_time_limit_stops_between_two_measurements(made):
    done = []
    assert not made.run(repeats=10_000, warmup=0, time_limit=0.3, tick=lambda: done.append(time.monotonic()))
    counts = [row["n"] for row in made.rows()]
    assert sum(counts) == len(done)
    assert max(counts) - min(counts) <= 1


def test_full_model_is_always_there(tiny_model):
    made = Benchmark(VLM(tiny_model, None), [fastv()], [1], TEXT, NEW, wall_clock)
    made.run(repeats=1, warmup=0)
    assert [row["method"] for row in made.rows()] == ["full", SINGLE]


def test_what_does_not_fit_is_left_out(made, monkeypatch):
    """Out of memory at one batch size costs that row alone."""
    whole = made._measure

    def measure(batch, method, times):
        if (batch, method.name) == (3, "full"):
            raise torch.OutOfMemoryError
        whole(batch, method, times)

    monkeypatch.setattr(made, "_measure", measure)
    made.run(repeats=2, warmup=0)
    assert made.too_large == [(3, "full")]
    rows = made.rows()
    assert (3, "full") not in [(row["batch"], row["method"]) for row in rows]
    assert all(row["speedup"] is None for row in rows if row["batch"] == 3)
    assert all(row["n"] == 2 for row in rows)


def test_spread():
    assert spread([1.0]) is None
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert noisy(None)
    assert not noisy(0.01)


def test_processor_time_needs_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(LitPruneError, match="threads=1"):
        clock_for("cpu", torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock_for("cpu", torch.device("cpu")) is cpu_clock
    assert clock_for("wall", torch.device("cpu")) is wall_clock


@pytest.mark.parametrize("wrong", [{"new_tokens": 1}, {"text_tokens": 1}, {"batch_sizes": []}, {"batch_sizes": [0]}])
def test_sizes_that_can_not_be(tiny_model, wrong):
    options = {"batch_sizes": [1], "text_tokens": TEXT, "new_tokens": NEW, "clock": wall_clock, **wrong}
    with pytest.raises(LitPruneError, match="at least"):
        Benchmark(VLM(tiny_model, None), [], **options)


def test_names_must_differ(tiny_model):
    with pytest.raises(LitPruneError, match="same name"):
        Benchmark(VLM(tiny_model, None), [fastv(), fastv()], [1], TEXT, NEW, wall_clock)


# -- the command ----------------------------------------------------------------------------------------------------
@pytest.fixture
def here(monkeypatch) -> None:
    """Paths of plug-ins are relative to the project's folder."""
    monkeypatch.chdir(ROOT)


def test_command(file, tmp_path, capsys, here):
    out, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    before = torch.get_num_threads()
    run("-c", file, "--json", out, "--plot", picture)
    assert torch.get_num_threads() == before
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 1, 2, 2]
    assert [row["method"] for row in report["rows"]] == ["full", "FastV"] * 2
    assert all(set(row) == set(FIELDS) for row in report["rows"])
    assert report["rows"][1]["kept"] == {"2": 8}
    header = report["header"]
    assert header["visual_tokens"] == VISUAL
    assert (header["model"], header["layers"], header["random_weights"]) == ("llava", DEPTH, True)
    assert {"date", "command", "machine", "cores", "threads", "torch", "transformers", "dtype", "clock"} <= set(header)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "FastV" in printed.out
    assert "speed-up" in printed.out


def test_options_win_over_the_file_wherever_they_stand(file, tmp_path, here):
    out = tmp_path / "bench.json"
    method = "mine=configs/pruners/uniform.yaml"
    run("--batch-sizes", 3, "--methods", method, "--keep", 12, "--repeats", 1, "-c", file, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["method"], row["n"]) for row in rows] == [(3, "full", 1), (3, "mine", 1)]
    assert rows[1]["avg_visual_tokens"] == 12


def test_time_limit_reports_what_is_there(file, tmp_path, capsys, here):
    out = tmp_path / "bench.json"
    run("-c", file, "--repeats", 10_000, "--time-limit", 0.5, "--warmup", 0, "--json", out)
    report = json.loads(out.read_text())
    assert 1 <= report["rows"][0]["n"] < 10_000
    assert any("time limit of 0.5 s" in note for note in report["header"]["notes"])
    assert "time limit" in capsys.readouterr().err


def test_no_time_at_all(file, capsys, here):
    with pytest.raises(SystemExit):
        run("-c", file, "--time-limit", -1)
    assert "nothing was measured" in capsys.readouterr().err


def test_notes_say_where_noise_won(made):
    made.run(repeats=1, warmup=0)
    header = {"load_average_before": 0.0, "load_average_after": 9.0, "cores": 2}
    notes = "\n".join(bench._notes(made, made.rows(), header, None))
    assert "too noisy to say" in notes
    assert f"{SINGLE} at batch 3" in notes
    assert "load average 9.0 on 2 cores" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--methods", "configs/bench/pruners/fastv.yaml"], "names no budget"),
        (["--methods", "configs/bench/pruners/fastv.yaml@3:8"], "stages are before layers"),
        (["--methods", "configs/bench/pruners/fastv.yaml@few"], "counts by layer"),
        (["--methods", "nowhere.yaml@8"], "nowhere.yaml"),
        (["--model", "nowhere/here"], "hf download nowhere/here"),
    ],
)
def test_what_a_user_may_get_wrong(file, capsys, change, message, here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        run("-c", file, *change)
    assert message in capsys.readouterr().err


def test_wrong_model_fields(file, capsys, here):
    options = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**options, "model": {"model_type": "lava"}}))
    with pytest.raises(SystemExit):
        run("-c", file)
    assert "describes no model of transformers" in capsys.readouterr().err


def test_unknown_key_of_a_file(file, capsys, here):
    options = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**options, "bach_sizes": [1]}))
    with pytest.raises(SystemExit):
        run("-c", file)
    error = capsys.readouterr().err
    assert "bach_sizes" in error
    assert "batch_sizes" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for option in ("config", "methods", "batch_sizes", "time_limit", "clock", "json", "plot", "threads"):
        assert f"--{option}" in printed
    assert "-c is --config" in printed


# -- the shipped files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "sizes"), [("cpu", (12, 768, 2048, 12)), ("gpu_7b", (32, 4096, 11008, 32))], ids=["cpu", "gpu_7b"]
)
def test_shipped_files(here, name, sizes):
    """Their sizes, and that each method builds for them, on the meta device, at the counts that its name promises."""
    options = yaml.safe_load((ROOT / "configs" / "bench" / f"{name}.yaml").read_text())
    assert set(options) <= set(inspect.signature(bench.run).parameters)
    model = options["model"]
    vlm = load(config_of(model, "`model`") if isinstance(model, dict) else model, random_weights=True, device="meta")
    size = vlm.size
    assert (size.depth, size.width, size.mlp, size.heads) == sizes
    assert (find(vlm.model).dims.visual, options["text_tokens"]) == (576, 64)
    for spec in options["methods"]:
        method = bench._method(spec, None)
        if method.plugin is not None:
            schedule = vlm.attach(method.plugin, keep=method.keep).host.schedule
            assert method.name.endswith(" ".join(f"{layer}:{count}" for layer, count in schedule.items()))
            vlm.detach()


@pytest.mark.gpu
def test_command_on_cuda(file, tmp_path, here):
    """Events for a clock, a count of the peak."""
    out = tmp_path / "bench.json"
    run("-c", file, "--device", "cuda", "--json", out)
    report = json.loads(out.read_text())
    assert report["header"]["clock"] == "cuda events"
    assert all(row["peak_memory_bytes"] > row["kv_bytes"] for row in report["rows"])
