"""Laws of pruning, measured on a tiny random model of each class of transformers' image-text-to-text list."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.parts import allowed_stages
from lit_prune.host.zoo.inputs import Inputs, Prompts, prompts
from lit_prune.host.zoo.shrink import tiny_model
from lit_prune.host.zoo.videos import video_prompts
from lit_prune.pruners.base import Pruner
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM

LAYERS = [2, 4, 6]
ALL = "all"
UNREAD = (
    "attention can't be read"  # in what is said of a method that reads attention where the library has none to read
)
SHARE = "45%"
WORDS = 90  # ids from here on are no words of the prompts
ANSWER = 4
TOLERANCE = 1e-3  # in fp32, of logits whose standard deviation is about 1


@dataclass
class Findings:
    """Outcome of the laws for one class.

    `laws` holds the largest differences, "same" or "differs" where bits count, and sentences of refusal; `error` is a
    raw error's last line, of the law in `laws` that came last.
    """

    kind: str
    laws: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    error: str | None = None
    place: str = ""

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.error is not None:
            return "library" if self.laws.get("plain") is False else "crash"
        if self.refused is not None:
            return "refused"
        return "works" if not self.broken else "wrong"

    @property
    def broken(self) -> list[str]:
        """Laws that don't hold."""
        return [
            law
            for law, found in self.laws.items()
            if found is False or (isinstance(found, float) and not found <= TOLERANCE)
        ]


def methods(layers: Sequence[int]) -> dict[str, Callable[[], Pruner]]:
    """Methods that read nothing, the attention of the layer before, and that of their own, at some stages."""
    return {
        "uniform": lambda: method("uniform.Uniform", layers=[layers[0], layers[-1]]),
        "fastv": lambda: method("fastv.FastV", layers=[layers[-1]]),
        "text attention": lambda: method("text_attention.TextAttention", layers=[layers[0], layers[-1]]),
    }


def method(path: str, **arguments: Any) -> Pruner:
    """A method by its class path, as in a YAML file."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"lit_prune.pruners.{module}"), name)(**arguments)


def stages(model: nn.Module) -> list[int]:
    """Three layers before which a model can be pruned, as they are spread; fewer where there are no three."""
    allowed = allowed_stages(model.config)[1:]
    if not allowed:
        return LAYERS
    return sorted({allowed[round(part * (len(allowed) - 1))] for part in (0.17, 0.5, 0.83)})


def measure(kind: str, seed: int = 0, laws: bool = True, videos: bool = False) -> Findings:
    """Every law on one class; without `laws` whether a method can be attached, and why not; with `videos` on videos."""
    found = Findings(kind)
    law = "build"
    try:
        model = tiny_model(kind, seed)
        law = "attach"
        vlm = attached(VLM(model, None, kind), ALL).detach()
        if not laws:
            return found
        law = "plain"
        given = video_prompts(kind, model) if videos else prompts(kind, model)
        _plain(vlm, given)
        for law, value in _laws(vlm, given):
            found.laws[law] = value
    except LitPruneError as error:
        if law == "attach" or (videos and law == "plain"):
            found.refused = str(error)
        else:
            found.error, found.place = f"after {law}: LitPruneError: {error}", _place(error)
    except Exception as error:
        if law in ("build", "plain"):
            found.laws["plain"] = False
        found.error, found.place = (
            f"after {law}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            _place(error),
        )
    return found


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


def _laws(vlm: VLM, given: Prompts) -> Iterator[tuple[str, Any]]:
    """Each law's name with what was found."""
    model, batch = vlm.model, given.batch()
    with torch.no_grad():
        plain = model(**batch).logits
        text = given.text(batch)
    own = {"batch = alone": _alone_gap(vlm, given), "cached = recomputed": _cached_gap(vlm, given)}
    for law, gap in own.items():
        if gap > TOLERANCE:
            yield f"{law}, plain", f"the plain model's own differ by {gap:.0e}"
    yield "scale", f"{plain[text].std():.2f}"
    yield "keep-all", _keep_all(vlm, batch, plain)
    for name, make in methods(stages(model)).items():
        try:
            vlm.attach(make(), keep="80%")
        except LitPruneError as error:
            yield name, str(error)
            continue
        with torch.no_grad(), vlm.using(Session(record=(record := Record()))):
            pruned = model(**batch).logits
        yield (
            f"{name} prunes",
            bool((record.trace.average_visual() < record.trace.total_visual - 0.2).all()) or _few(record),
        )
        yield name, bool(pruned.isfinite().all()) and (plain - pruned).abs()[text].max().item() > 1e-4
    attached(vlm, SHARE)
    for side in ("left", "right"):
        inputs = {**given.batch(side=side, answers=3), "use_cache": False}
        real = given.text(inputs)
        with torch.no_grad(), vlm.using(Session()):
            dropped = model(**inputs).logits
        try:
            with torch.no_grad(), vlm.using(Session(soft=True, eps=1e-30)):
                masked = model(**inputs).logits
        except LitPruneError as error:
            yield "soft", str(error)
        else:
            yield f"drop = mask, {side}", (dropped - masked).abs()[real].max().item()
    for law, measured in (("batch = alone", _alone_gap), ("cached = recomputed", _cached_gap)):
        if own[law] <= TOLERANCE:
            yield law, measured(vlm, given)
    yield from _training(vlm, given)
    vlm.detach()
    with torch.no_grad():
        yield "detach", torch.equal(model(**batch).logits, plain)


def _few(record: Record) -> bool:
    return bool((record.trace.total_visual <= 2).any())


def attached(vlm: VLM, keep: str) -> VLM:
    """RCP with its repair adapter, moved away from its start, as training would."""
    budget = ",".join(f"{layer}:100000" for layer in stages(vlm.model)) if keep == ALL else keep
    torch.manual_seed(3)
    try:
        vlm.attach(*rcp_and_repair(vlm.model), keep=budget)
    except LitPruneError as error:
        if UNREAD not in str(error):
            raise
        vlm.attach(*rcp_and_repair(vlm.model, reads=False), keep=budget)
    draw = torch.Generator().manual_seed(2)
    for parameter in vlm.plugin.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return vlm


def rcp_and_repair(model: nn.Module, reads: bool = True) -> tuple[Pruner, RepairAdapter]:
    """Small ones for a tiny model; `reads=False`: the repair adapter beside a method that reads no attention."""
    layers = stages(model)
    ratios = {"layers": layers, "stage_ratios": [4.0, 2.0, 1.0][-len(layers) :]}
    repair = RepairAdapter([6, 7], [0, len(layers) - 1], bottleneck=16, condition=8, code=4)
    if not reads:
        return method("uniform.Uniform", **ratios), repair
    return method("rcp.RCP", **ratios, select="topk", inner=16), repair


def _plain(vlm: VLM, given: Prompts) -> None:
    """The model's own forward and answer, which may fail without anything attached."""
    with torch.no_grad():
        vlm.model(**given.batch())
    generate(vlm, given.batch([0]))


def _keep_all(vlm: VLM, batch: Inputs, plain: Tensor) -> bool:
    attached(vlm, ALL)
    for adapter in vlm.plugin.repair.adapters:
        adapter.alpha.data.zero_()
    with torch.no_grad():
        return torch.equal(vlm.model(**batch).logits, plain)


def generate(vlm: VLM, inputs: Inputs, tokens: int = ANSWER, **options: Any) -> Any:
    """Stock `generate()`, greedy, of words alone; `.logits` (batch, tokens, vocabulary)."""
    size = vlm.model.config.get_text_config().vocab_size
    fixed = {"do_sample": False, "suppress_tokens": list(range(WORDS, size)), "pad_token_id": 0, "eos_token_id": None}
    out = vlm.model.generate(
        **inputs, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True, **fixed, **options
    )
    out.logits = torch.stack(out.logits, 1)
    return out


def _alone_gap(vlm: VLM, given: Prompts) -> float:
    together = generate(vlm, given.batch()).logits
    alone = (generate(vlm, given.batch([row])).logits[0] for row in range(3))
    return max((one - together[row]).abs().max().item() for row, one in enumerate(alone))


def _cached_gap(vlm: VLM, given: Prompts) -> float:
    """Between logits of decoding on the cache and those of one forward over prompt and answer, each sample alone."""
    worst = 0.0
    for row in (0, 1):
        inputs = given.batch([row])
        start = inputs["input_ids"].shape[1]
        out = generate(vlm, inputs)
        whole = longer(given, inputs, out.sequences, start)
        with torch.no_grad():
            again = vlm.model(**whole, use_cache=False).logits[:, start - 1 : -1]
        worst = max(worst, (again - out.logits).abs().max().item())
    return worst


def longer(given: Prompts, inputs: Inputs, sequences: Tensor, start: int) -> Inputs:
    """The inputs with what was generated behind them, as labels too."""
    labels = sequences.clone()
    labels[:, :start] = -100
    mask = torch.ones_like(sequences)
    mask[:, :start] = inputs["attention_mask"]
    return {
        **inputs,
        "input_ids": sequences,
        "attention_mask": mask,
        "labels": labels,
        **given.extra(sequences, mask, start),
    }


def _training(vlm: VLM, given: Prompts) -> Iterator[tuple[str, Any]]:
    inputs = {**given.batch(side="right", answers=3), "use_cache": False}
    for soft in (True, False):
        name = "train, soft" if soft else "train, drop"
        if not list(vlm.plugin.pruner.parameters()):
            yield "rcp", f"{vlm.model.config.get_text_config()._attn_implementation} attention can't be read"
        vlm.plugin.pruner.train()
        vlm.plugin.requires_grad_(True)
        try:
            with vlm.using(Session(soft=soft, eps=1e-4)):
                loss = vlm.model(**inputs).loss
                loss.backward()
        except LitPruneError as error:
            yield name, str(error)
            continue
        missing = [key for key, p in vlm.plugin.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        still = [
            key
            for key, p in vlm.plugin.named_parameters()
            if p.grad is not None and not p.grad.any() and "code" not in key and not key.endswith(".unused")
        ]
        if missing or still:
            yield f"{name}: {(missing + still)[:3]}", False
        else:
            torch.optim.SGD(vlm.plugin.parameters(), lr=1e-4).step()
            yield name, True
        vlm.plugin.zero_grad()
        vlm.plugin.pruner.eval()
