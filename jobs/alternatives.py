"""FastV and VisionZip of lit_prune beside the way that public implementations do it, and kvpress, in one run.

python jobs/alternatives.py                                   # mid-size LLaVA of configs/bench/cpu.yaml, one CPU thread
python jobs/alternatives.py --batch-sizes 1 --repeats 3 --json runs/alternatives.json

The public way, restated from its description and never copied: eager attention for the scores, for FastV in the layer
that scores, for VisionZip in all of the tower; full float masks of batch x 1 x tokens x tokens; a loop over the batch
where tokens are chosen and sequences built. Otherwise it is favoured: the other layers use SDPA, and its decoding is
that of the plain model on its shorter cache. kvpress compresses the cache of a full prefill to as many entries in each
layer as FastV keeps in its later ones; it has a row where the package is installed. Its hook reads two arguments of the
attention that transformers renamed since: they are passed to it under their earlier names.

One process, one set of random weights, one thread, its processor time, variants in turn, medians over the rounds. The
peak is what PyTorch allocated beyond the weights during one request, by its profiler, in a run that isn't timed.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from lit_prune.commands._support.inputs import load_model
from lit_prune.commands._support.machine import cpu_name
from lit_prune.evaluation.timing import clock_for, peak_bytes
from lit_prune.evaluation.timing.prompts import Prompt, decode, prefill, random_prompt
from lit_prune.host.compat import cache_keyword
from lit_prune.loading import config_of
from lit_prune.ops.budget import parse_budget
from lit_prune.vlm import VLM, plugin_from_yaml

try:
    import kvpress
except ImportError:
    kvpress = None

ROOT = Path(__file__).parents[1]
LAYER, KEEP, CONTEXTUAL = 2, 64, 10  # FastV's stage; visual tokens after it, and of VisionZip; its contextual ones


@dataclass
class Variant:
    """One row: from pixels to what the decoder takes, from there to the first token and the cache, and around both."""

    name: str
    encode: Callable[[dict[str, Any]], Any]
    prefill: Callable[[Any], tuple[Tensor, Any]]
    inside: Callable[[], Any]


def float_mask(batch: int, tokens: int) -> Tensor:
    """Causal mask over all pairs, as numbers to add."""
    low = torch.finfo(torch.float32).min
    return torch.full((tokens, tokens), low).triu(1)[None, None].repeat(batch, 1, 1, 1)


class Public:
    """Both methods the public way, on a plain LLaVA."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.decoder, self.head = model, model.model.language_model, model.lm_head
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.image, self.feature_layer = model.config.image_token_id, model.config.vision_feature_layer

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Text with the image's features between its two parts, one sample after the other."""
        rows = []
        for row, own in zip(ids, features, strict=True):
            at = (row == self.image).nonzero()[:, 0]
            before, after = row[: at[0]], row[at[-1] + 1 :]
            table = self.decoder.embed_tokens
            rows.append(torch.cat([table(before), own, table(after)]))
        return torch.stack(rows)

    def layers(self, states: Tensor, start: int, stop: int, place: Tensor, cache: Any) -> Tensor:
        """Some decoder layers with full float masks."""
        mask, rotary = float_mask(*states.shape[:2]), self.decoder.rotary_emb(states, position_ids=place)
        named = {cache_keyword(self.model): cache, "use_cache": True}
        for layer in self.decoder.layers[start:stop]:
            states = layer(states, attention_mask=mask, position_ids=place, position_embeddings=rotary, **named)
        return states

    def plain_features(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Ids and all projected patches."""
        states = self.tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[self.feature_layer]
        return inputs["input_ids"], self.projector(states[:, 1:])

    def fastv(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """Prefill in which visual tokens leave by the attention of the layer before `LAYER`."""
        ids, features = found
        states, cache = self.embed(ids, features), new_cache(self.decoder.config)
        batch, tokens, _ = states.shape
        place, weights = torch.arange(tokens).expand(batch, -1), []
        states = self.layers(states, 0, LAYER - 1, place, cache)
        scoring = self.decoder.layers[LAYER - 1].self_attn
        with eager(self.decoder, scoring, weights):
            states = self.layers(states, LAYER - 1, LAYER, place, cache)
        kept = []
        for row, attention in zip(ids, weights[0], strict=True):
            visual = (row == self.image).nonzero()[:, 0]
            best = visual[attention.mean(0)[-1, visual].topk(KEEP).indices]
            kept.append(torch.cat([(row != self.image).nonzero()[:, 0], best]).sort().values)
        states = torch.stack([own[at] for own, at in zip(states, kept, strict=True)])
        states = self.layers(states, LAYER, len(self.decoder.layers), torch.stack(kept), cache)
        return self.head(self.decoder.norm(states[:, -1:])).argmax(-1), cache

    def visionzip_features(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Ids, and dominant and contextual patches, projected."""
        keys: list[Tensor] = []
        layer = self.tower.encoder.layers[self.feature_layer]
        hook = layer.self_attn.k_proj.register_forward_hook(lambda module, taken, given: keys.append(given))
        weights: list[Tensor] = []
        with eager(self.tower, layer.self_attn, weights):
            output = self.tower(inputs["pixel_values"], output_hidden_states=True)
        hook.remove()
        states, features = output.hidden_states[self.feature_layer], []
        heads = layer.self_attn.num_heads
        for own, attention, key in zip(states, weights[0], keys[0], strict=True):
            best = attention[:, 0, 1:].sum(0).topk(KEEP - CONTEXTUAL).indices + 1
            rest = torch.ones(len(own), dtype=torch.bool)
            rest[best], rest[0] = False, False
            others = own[rest]
            metric = torch.nn.functional.normalize(key[rest].unflatten(1, (heads, -1)).mean(1), dim=-1)
            centres = torch.arange(0, len(others), len(others) // CONTEXTUAL)[:CONTEXTUAL]
            member = torch.ones(len(others), dtype=torch.bool)
            member[centres] = False
            home = (metric[member] @ metric[centres].T).argmax(1)
            one_hot = torch.nn.functional.one_hot(home, CONTEXTUAL).float()
            means = one_hot.T @ others[member] / one_hot.sum(0).clamp(min=1)[:, None]
            features.append(torch.cat([own[best.sort().values], others[centres] + means]))
        return inputs["input_ids"], self.projector(torch.stack(features))

    def short(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """Prefill over the features that are left."""
        states, cache = self.embed(*found), new_cache(self.decoder.config)
        place = torch.arange(states.shape[1]).expand(states.shape[0], -1)
        states = self.layers(states, 0, len(self.decoder.layers), place, cache)
        return self.head(self.decoder.norm(states[:, -1:])).argmax(-1), cache


def new_cache(config: Any) -> Any:
    """An empty cache."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


@contextmanager
def eager(model: nn.Module, attention: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Inside, a model's attention is eager, and the weights of one layer are kept."""
    before = model.config._attn_implementation
    hook = attention.register_forward_hook(lambda module, taken, given: weights.append(given[1]))
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
        hook.remove()


@contextmanager
def attached(vlm: VLM, path: str, keep: str) -> Iterator[None]:
    """Inside, a method is attached."""
    vlm.attach(plugin_from_yaml(ROOT / path), keep=parse_budget(keep, "--keep"))
    try:
        yield
    finally:
        vlm.detach()


@contextmanager
def pressed(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, kvpress' SnapKV compresses the cache of a prefill of `tokens` to text and `KEEP` visual tokens."""
    press = kvpress.SnapKVPress(compression_ratio=1 - (tokens - 576 + KEEP) / tokens)

    def hook(module: nn.Module, taken: tuple, named: dict[str, Any], given: Any) -> Any:
        length = named["hidden_states"].shape[1]
        if length == 1:
            return given
        cache = named[cache_keyword(model)]
        return press.forward_hook(
            module, taken, {**named, "past_key_values": cache, "cache_position": torch.arange(length)}, given
        )

    rotary, layers = model.model.language_model.rotary_emb, model.model.language_model.layers
    for layer in layers:
        layer.self_attn.rotary_emb = rotary
    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
        for layer in layers:
            del layer.self_attn.rotary_emb


def variants(vlm: VLM, tokens: int) -> list[Variant]:
    """All rows."""
    model, public = vlm.model, Public(vlm.model)

    def plain(inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        return prefill(model, inputs)

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    def fastv() -> Any:
        return attached(vlm, "configs/bench/pruners/fastv.yaml", f"{LAYER}:{KEEP}")

    def visionzip() -> Any:
        return attached(vlm, "configs/pruners/visionzip.yaml", str(KEEP))

    rows = [
        Variant("full model", vlm.encode_images, plain, nothing),
        Variant("FastV, lit_prune", vlm.encode_images, plain, fastv),
        Variant("FastV, public way", public.plain_features, public.fastv, nothing),
        Variant("VisionZip, lit_prune", vlm.encode_images, plain, visionzip),
        Variant("VisionZip, public way", public.visionzip_features, public.short, nothing),
    ]
    if kvpress is not None:
        rows.append(Variant("SnapKV, kvpress", vlm.encode_images, plain, lambda: pressed(model, tokens)))
    return rows


@torch.inference_mode()
def measure(variant: Variant, prompt: Prompt, model: nn.Module, steps: int) -> dict[str, float]:
    """One request: seconds of the tower, of the prefill, and of each further token."""
    clock = clock_for("cpu", model.device)
    with variant.inside():
        tower, features = clock(lambda: variant.encode(prompt.pixels))
        first, (token, cache) = clock(lambda: variant.prefill(features))
        rest, _ = clock(lambda: decode(model, token, cache, steps))
    return {"prefill": first, "ttft": tower + first, "decode": rest / steps}


@torch.inference_mode()
def peak(variant: Variant, prompt: Prompt, model: nn.Module) -> int:
    """Bytes at most during one request."""
    with variant.inside():
        return peak_bytes(
            lambda: decode(model, *variant.prefill(variant.encode(prompt.pixels)), 1), torch.device("cpu")
        )


def cell(values: list[float]) -> str:
    """Median in milliseconds and half the interquartile range in percent of it."""
    low, high = np.percentile(values, [25, 75])
    return f"{1e3 * median(values):.0f} ± {50 * (high - low) / median(values):.0f} %"


def main() -> None:
    """Measure, print a table, and write what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "configs/bench/cpu.yaml", help="file with a model's fields"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="(default 1 8)")
    parser.add_argument("--text-tokens", type=int, default=64, help="beside the image's (default 64)")
    parser.add_argument("--steps", type=int, default=8, help="further tokens that are decoded (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before that, which aren't counted (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fields = yaml.safe_load(options.model.read_text(encoding="utf-8"))["model"]
    vlm = load_model(config_of(fields, "`model`"), "float32", "cpu", True)
    prompts = {size: random_prompt(vlm, size, options.text_tokens) for size in options.batch_sizes}
    rows = variants(vlm, options.text_tokens + 576)
    times: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in tqdm(range(-options.warmup, options.repeats), "rounds"):
        for size, prompt in prompts.items():
            for variant in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
                for name, value in measure(variant, prompt, vlm.model, options.steps).items():
                    times[size, variant.name][name] += [value] * (turn >= 0)
    peaks = {(size, row.name): peak(row, prompt, vlm.model) for size, prompt in prompts.items() for row in rows}
    print(f"{cpu_name()}, one thread, torch {torch.__version__}, {options.repeats} rounds")
    print("| batch | variant | prefill ms | time to first token ms | ms a further token | peak MB |")
    print("|---:|---|---:|---:|---:|---:|")
    keys = [(size, row.name) for size in prompts for row in rows]
    for size, name in keys:
        figures = " | ".join(cell(times[size, name][key]) for key in ("prefill", "ttft", "decode"))
        print(f"| {size} | {name} | {figures} | {peaks[size, name] / 1e6:.0f} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        table = [{"batch": s, "name": n, "peak": peaks[s, n], **times[s, n]} for s, n in keys]
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
