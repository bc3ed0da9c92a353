"""Accuracy with the visual tokens of highest saliency alone, kept before the decoder's first layer.

`python jobs/micro_576/saliency.py` scores visual tokens of the validation split by the gradient of the full model's own
answer, keeps the best, and asks again: what `loss.saliency` aims at. For comparison, the same with the attention of the
prompt's tokens, averaged over all layers. An answer counts if each of its tokens is the most likely one after the right
ones before it.
"""

import argparse
from collections import defaultdict
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

import lit_prune
from lit_prune.data.micro import MicroData
from lit_prune.host import Record, Session
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Context, Pruner
from lit_prune.training.losses import saliency

MODEL = "micro-576"


class Given(Pruner):
    """Scores that the caller hands over: a hint `scores`, (batch, N)."""

    def score(self, context: Context) -> Tensor:
        """Those of the tokens that are there."""
        return context.hints["scores"].gather(1, context.ordinal)


def right(logits: Tensor, record: Record) -> list[bool]:
    """For each sample, True if the model predicts every token of the answer."""
    hits = (logits.argmax(-1) == record.targets).split(record.answers.tolist())
    return [bool(hit.all()) for hit in hits]


def measure(batch: dict, vlm: lit_prune.VLM, budgets: list[int]) -> dict[str, list[bool]]:
    """Answers of a batch: of the full model, and at each budget by each score."""
    layers = tuple(range(vlm.plugin.dims.depth))
    record = Record()
    read = Session(prune=False, record=record, derive=(0,), watch=layers, answers_only=True)
    with torch.enable_grad(), vlm.using(read):
        logits = vlm.model(**batch["inputs"], use_cache=False).logits[0]
        scores = {"saliency": saliency(logits, record)[0]}
    scores["attention"] = torch.stack([record.attention[layer].detach() for layer in layers]).mean(0)
    found = {"full": right(logits, record)}
    for keep in budgets:
        for name, given in scores.items():
            vlm.attach(Plugin(Given(layers=[0], stage_ratios=[1.0]), keep=keep), keep=keep)
            record = Record()
            with torch.no_grad(), vlm.using(Session(hints={"scores": given}, record=record, answers_only=True)):
                logits = vlm.model(**batch["inputs"], use_cache=False).logits[0]
            found[f"{name} {keep}"] = right(logits, record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=180, help="questions, 18 a scene")
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 32, 16], help="budgets")
    options = parser.parse_args()
    vlm = lit_prune.load(MODEL)
    vlm.attach(Plugin(Given(layers=[0], stage_ratios=[1.0]), keep=options.keep[0]), keep=options.keep[0])
    sizes = {"questions_per_image": 18, "eval_batch_size": 18, "train_samples": 18, "test_samples": 18}
    data = MicroData(MODEL, val_samples=options.samples, num_workers=0, **sizes)
    data.prepare_data()
    data.setup("validate")
    found: dict[str, list[bool]] = defaultdict(list)
    for batch in tqdm(data.val_dataloader()):
        for name, hits in measure(batch, vlm, options.keep).items():
            found[name] += hits
    for name, hits in found.items():
        print(f"{name:<16}{100 * fmean(hits):.1f} % of {len(hits)}")


if __name__ == "__main__":
    main()
