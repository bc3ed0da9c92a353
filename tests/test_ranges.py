"""Numbers that can't be: refused when the object is made, by key and range, before a model is loaded."""

import pytest
import shapes

from lit_prune.errors import LitPruneError, check_number
from lit_prune.pruners.cdpruner import CDPruner
from lit_prune.pruners.chain import Chain
from lit_prune.pruners.dart import DART
from lit_prune.pruners.dcp import DCPPrune
from lit_prune.pruners.id_selection import IDSelection
from lit_prune.pruners.prumerge import PruMergePlus
from lit_prune.pruners.random import Random
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.scope import Scope
from lit_prune.pruners.sparsevlm import SparseVLM
from lit_prune.pruners.tops import TOPS
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.repair import RepairAdapter
from lit_prune.training import module as training
from lit_prune.training.losses import Anneal, LossWeights

WEIGHTS = ("task", "repair", "budget", "variance", "distill", "attention")
NAN, INF = float("nan"), float("inf")


def module(**options) -> None:
    training.PruneModule(pruner=Random([0]), **options)


def chain(middle: float) -> Chain:
    return Chain(DCPPrune(), Random([1]), middle)


CASES = [
    (module, "model.lr", "lr", (-1.0, NAN, INF, -INF, "0.1", True), (0.1,)),
    (module, "model.repair_lr", "repair_lr", (-1e-9, NAN), (None, 0.0, 0.1)),
    (module, "model.weight_decay", "weight_decay", (-0.1, NAN, INF), (0.0, 0.1)),
    (module, "model.warmup", "warmup", (-0.1, 1.1, NAN), (0.0, 1.0)),
    (module, "model.final_lr", "final_lr", (-0.1, 1.1, NAN), (0.0, 1.0)),
    (module, "model.contenders", "contenders", (0.0, 0.9, NAN, INF), (None, 1.0, 100.0)),
    (module, "model.gate_clip", "gate_clip", (0.0, -1.0, NAN, INF), (None, 0.01)),
    (module, "model.max_new_tokens", "max_new_tokens", (0, -1, 1.5, True), (1,)),
    (module, "model.seed", "seed", (-1, 2**32, 0.5), (0, 2**32 - 1)),
    *((LossWeights, f"model.loss.{name}", name, (-0.1, NAN, INF, True), (0.0, 200.0)) for name in WEIGHTS),
    (LossWeights, "model.loss.sharpen", "sharpen", (0.0, -1.0, NAN, INF), (0.5, 3.0)),
    (Anneal, "model.anneal.tau_start", "tau_start", (0.0, -1.0, NAN), (0.1,)),
    (Anneal, "model.anneal.tau_end", "tau_end", (0.0, -1.0, INF), (0.1,)),
    (Anneal, "model.anneal.tau_share", "tau_share", (-0.1, 1.1, NAN), (0.0, 1.0)),
    (Anneal, "model.anneal.quiet_share", "quiet_share", (-0.1, 1.1, NAN), (0.0, 1.0)),
    (Anneal, "model.anneal.target_share", "target_share", (-0.1, 1.1, NAN), (0.0, 1.0)),
    (Anneal, "model.anneal.noise", "noise", (-0.1, NAN, INF), (0.0, 1.0)),
    (RepairAdapter, "repair.alpha", "alpha", (NAN, INF), (-0.1, 0.0, 0.1)),
    (RepairAdapter, "repair.bottleneck", "bottleneck", (0, -1), (1,)),
    (RepairAdapter, "repair.condition", "condition", (0, -1), (1,)),
    (RepairAdapter, "repair.code", "code", (0, -1), (1,)),
    (RepairAdapter, "repair.depth", "depth", (0, -1), (None, 1)),
    (RCP, "pruner.inner", "inner", (0, -4), (512,)),
    (RCP, "pruner.heads", "heads", (0, -4), (1, 4)),
    (RCP, "pruner.queries", "queries", (0, -1), (1,)),
    (RCP, "pruner.dropout", "dropout", (-0.1, 1.0, NAN), (0.0, 0.9)),
    (RCP, "pruner.bias", "bias", (NAN, INF), (-2.0, 0.0)),
    (RCP, "pruner.attention_floor", "attention_floor", (0.0, 1.0, NAN), (1e-6,)),
    (RCP, "pruner.keep_mass", "keep_mass", (0.0, 1.1, NAN), (0.5, 1.0, [0.5, 0.9, 1.0])),
    (Random, "pruner.depth", "depth", (0, -1), (None, 16)),
    (SparseVLM, "pruner.recycled", "recycled", (-0.1, 1.0, NAN), (0.0, 0.5)),
    (SparseVLM, "pruner.per_cluster", "per_cluster", (0,), (1,)),
    (SparseVLM, "pruner.neighbours", "neighbours", (0,), (1,)),
    (DART, "pruner.visual_pivots", "visual_pivots", (-1,), (4,)),
    (PruMergePlus, "pruner.neighbours", "neighbours", (0,), (32,)),
    (TOPS, "pruner.coverage", "coverage", (-1.0, NAN), (0.0, 1.0)),
    (IDSelection, "pruner.gamma", "gamma", (-1.0, INF), (0.0, 20.0)),
    (Scope, "pruner.power", "power", (-1.0, NAN), (0.0, 1.0)),
    (VisionZip, "pruner.contextual", "contextual", (-0.1, 1.0, NAN), (0.0, 0.5)),
    (VisionZip, "pruner.vision_depth", "vision_depth", (0,), (None, 4)),
    (DCPPrune, "pruner.temperature", "temperature", (0.0, NAN), (0.3,)),
    (DCPPrune, "pruner.candidates", "candidates", (0.9, INF), (1.0,)),
    (DCPPrune, "pruner.strength", "strength", (NAN,), (1.0,)),
    (chain, "pruner.middle", "middle", (0.0, -1.0, NAN), (3.0,)),
]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is the sign that every number was taken."""

    def loaded(*args, **options):
        raise InterruptedError

    monkeypatch.setattr(training, "load", loaded)


@pytest.mark.parametrize(("make", "key", "name", "bad", "good"), CASES, ids=[case[1] for case in CASES])
def test_a_number_out_of_range_is_refused_by_its_key(make, key: str, name: str, bad: tuple, good: tuple) -> None:
    for value in bad:
        with pytest.raises(LitPruneError, match=rf"^{key} is {value}; it must be a (finite|whole) number"):
            make(**{name: value})
    for value in good:
        try:
            make(**{name: value})
        except InterruptedError:
            assert make is module


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Random([0, 3], [1.0, 0.0]), r"pruner\.stage_ratios\[1\] is 0\.0; it must be a finite number above 0"),
        (lambda: Random([0], [NAN]), r"pruner\.stage_ratios\[0\] is nan"),
        (lambda: VisionZip([-2]), r"pruner\.vision_layers\[0\] is -2; it must be a whole number of at least -1"),
        (lambda: RepairAdapter([22], [-1]), r"repair\.stages\[0\] is -1"),
        (lambda: module(lr=0.0), "model.lr is 0: nothing would be trained"),
        (lambda: module(lr=0.0, repair_lr=0.0), "nothing would be trained"),
    ],
)
def test_lists_and_what_trains_nothing(make, key: str) -> None:
    with pytest.raises(LitPruneError, match=key):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VisionZip(merging="sum"), "pruner.merging: 'sum' is not one of added, mean"),
        (lambda: CDPruner(relevance="no"), "pruner.relevance: 'no' is not one of similar, dissimilar, none"),
        (lambda: SparseVLM(distance="rms"), "pruner.distance: 'rms' is not one of sample, width"),
    ],
)
def test_values_that_are_no_choice(monkeypatch: pytest.MonkeyPatch, make, says: str) -> None:
    monkeypatch.setattr(shapes.jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(LitPruneError) as refused:
        make()
    assert str(refused.value) == says


def test_one_learning_rate_of_zero_keeps_the_pruner_as_it_is() -> None:
    with pytest.raises(InterruptedError):
        module(lr=0.0, repair_lr=0.1)


@pytest.mark.parametrize("layer", [-1, 16, 0.5])
def test_watched_layers_lie_in_the_decoder(monkeypatch: pytest.MonkeyPatch, layer: float) -> None:
    monkeypatch.undo()
    with pytest.raises(LitPruneError, match=r"model\.watch\[1\] is .*; it must be a whole number of at least 0"):
        module(loss=LossWeights(attention=1.0), watch=[3, layer])


def test_ranges_in_words() -> None:
    for limits, words in (
        ({}, "a finite number"),
        ({"least": 0}, "a finite number of at least 0"),
        ({"above": 0, "most": 1}, "a finite number above 0 and at most 1"),
        ({"least": 0, "below": 1}, "a finite number of at least 0 and below 1"),
        ({"least": 1, "most": 4294967295, "whole": True}, "a whole number from 1 to 4294967295"),
    ):
        with pytest.raises(LitPruneError, match=f"^x is nan; it must be {words}$"):
            check_number("x", NAN, **limits)
