"""The teacher's answers, kept on disk: the same losses without its forward, and nothing lost by faults."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file, save_file
from tiny import shake, trainer

import lit_prune.training.teacher_cache as caching
from lit_prune.data.samples import Sample
from lit_prune.errors import LitPruneError
from lit_prune.host import Record
from lit_prune.ops.moments import joined, moments, sample_moments
from lit_prune.training.checks import check_teaching
from lit_prune.training.logging import WORK
from lit_prune.training.losses import LossWeights
from lit_prune.training.step import StepKey
from lit_prune.training.teacher_cache import TeacherCache, fingerprint

WATCHED = {"loss": LossWeights(attention=1.0), "watch": [8, 9]}


class Losses(Callback):
    """Losses of every step, and in how many of them the teacher ran."""

    def __init__(self) -> None:
        self.seen, self.taught = [], 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append(
            {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(("loss/", "shift/"))}
        )
        self.taught += int(pl_module.work._steps[-1][1].ran[0].sum() > 0)


def fit(student, world, folder, steps: int = 3, **options) -> Losses:
    found, given = Losses(), {**WATCHED, **options}
    module = student(**given)
    trainer(folder, [found], max_steps=steps, log_every_n_steps=1).fit(module, world())
    found.module = module
    return found


@pytest.fixture(scope="module")
def filled(student, world, tmp_path_factory):
    """A run of one epoch that has filled a cache: its losses, and the cache's folder."""
    root = tmp_path_factory.mktemp("filled")
    return fit(student, world, root / "run", teacher_cache=str(root / "cache")), root / "cache"


def files(root) -> list:
    return sorted(root.rglob("*.safetensors"))


def test_a_second_run_has_the_same_losses_without_a_teacher(student, world, filled, tmp_path):
    first, root = filled
    assert first.taught == 3
    again = fit(student, world, tmp_path, teacher_cache=str(root))
    assert again.taught == 0
    assert again.seen == first.seen
    plain = fit(student, world, tmp_path, steps=1)
    assert plain.seen[0] == pytest.approx(first.seen[0], rel=1e-4, abs=1e-6)
    work, whole = (dict(zip(WORK, run.module.work.totals.tolist(), strict=True)) for run in (again, first))
    assert work["flops"] < 0.8 * whole["flops"]
    assert {name: work[name] for name in work if name != "flops"} == {n: whole[n] for n in whole if n != "flops"}


def test_other_batches_of_the_same_samples_are_known(world, filled):
    """Digests don't depend on padding or company; the moments of a batch are joined from its samples'."""
    module, data = filled[0].module, world(batch_size=3, seed=5)
    data.digests = True
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    known, taught = (module.train().step(items, StepKey(3, 0.5)) for items in (batch, {**batch, "digests": ["x"] * 3}))
    assert (known.teacher.trace.ran[0].sum(), taught.teacher.hidden.keys()) == (0, {11, 14})
    for name, value in taught.losses.items():
        assert known.losses[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def opened(first: Losses, root) -> TeacherCache:
    cache = TeacherCache(str(root))
    cache.open(first.module.model, [11, 14], WATCHED["watch"], precision="32-true")
    return cache


def digests_in(path) -> list[str]:
    with caching.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[caching.HEADER])


@pytest.mark.parametrize("fault", ["cut", "numbers", "other", "header"])
def test_a_damaged_file_is_left_out(filled, tmp_path, fault):
    first, root = filled
    (path,) = files(root)
    digests, mine = digests_in(path), tmp_path / path.parent.name / path.name
    assert opened(first, root).find(digests, torch.device("cpu")) is not None
    mine.parent.mkdir()
    (mine.parent / ".leftover.safetensors.1.part").write_bytes(b"a killed process")
    if fault in ("cut", "other"):
        mine.write_bytes({"cut": path.read_bytes()[:-100], "other": b"pickle"}[fault])
    else:
        tensors = load_file(path)
        if fault == "numbers":
            tensors["var.11"][3] = float("nan")
        save_file(tensors, mine, {caching.HEADER: json.dumps(digests[: 11 if fault == "header" else 12])})

    def places_left() -> dict:
        cache = opened(first, tmp_path)
        assert cache.find(digests, torch.device("cpu")) is None
        return cache.known

    with pytest.warns(UserWarning, match="is damaged and is left out, delete it"):
        assert places_left() == {}


def test_a_full_disk_costs_the_cache_and_not_the_run(filled, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "save_file", full)
    first, root = filled
    known, cache = opened(first, root), opened(first, tmp_path)
    cache.waiting = {digest: known._read(digest) for digest in known.known}
    with pytest.warns(UserWarning, match="can't be written, nothing is added to it from here.*No space left"):
        cache.on_train_end()
    assert (cache.waiting, cache.full) == ({}, True)
    cache.add(["x"], Record())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["about.json"]


def test_an_epoch_begins_with_what_another_process_kept(filled, tmp_path):
    """Each epoch reshuffles the samples over the processes."""
    first, root = filled
    known, mine, others = opened(first, root), opened(first, tmp_path), opened(first, tmp_path)
    others.waiting = {digest: known._read(digest) for digest in known.known}
    others.on_train_epoch_end()
    assert (len(mine.known), len(others.known)) == (0, 12)
    mine.on_train_epoch_start(SimpleNamespace(current_epoch=0), None)
    assert mine.known == {}, "what there was when it was opened"
    mine.on_train_epoch_start(SimpleNamespace(current_epoch=1), None)
    assert mine.known == others.known


def test_an_interrupted_run_leaves_what_it_had(student, world, filled, tmp_path):
    class Break(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 1:
                raise RuntimeError("broken")

    module = student(**WATCHED, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path / "run", [Break()], max_steps=3).fit(module, world())
    assert len(caching._opened(files(tmp_path / "cache")[0]).get_tensor("count")) == 4


def test_another_model_or_other_layers_know_nothing(student, tmp_path):
    module = student()
    before = fingerprint(module.model)
    cache, folders = TeacherCache(str(tmp_path)), set()
    for layers, watch, precision in (
        ([11], [], "32"),
        ([11, 14], [], "32"),
        ([11], [8], "32"),
        ([11], [], "bf16-mixed"),
    ):
        cache.open(module.model, layers, watch, precision=precision)
        folders.add(cache.folder)
    assert len(folders) == 4
    shake(module.model.get_decoder().layers[3].mlp)
    assert fingerprint(module.model) != before
    module.model.config.vision_feature_layer = -2
    assert fingerprint(module.model) != before


def test_what_the_cache_can_t_serve_is_refused(student, world, tmp_path):
    with pytest.raises(LitPruneError, match=r"keeps no logits.*model\.loss\.distill"):
        student(teacher_cache=str(tmp_path), loss=LossWeights(distill=1.0))
    module = student(teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(LitPruneError, match=r"model\.teacher_cache spares a rank its teacher.*DeepSpeed"):
        check_teaching(module.teaching, in_step=True, fitting=True)
    with pytest.raises(LitPruneError, match="it has no `digests`"):
        trainer(tmp_path).fit(module, torch.utils.data.DataLoader([{"inputs": {}, "ids": []}]))
    (tmp_path / "file").write_text("")
    with pytest.raises(LitPruneError, match=r"teacher_cache: .*file/.* can't be made"):
        trainer(tmp_path).fit(student(teacher_cache=str(tmp_path / "file")), world())


def test_moments_of_samples_join_to_those_of_all():
    tokens, count = 3 + 2 * torch.randn(9, 5), torch.tensor([4, 0, 5])
    for one, other in zip(joined(sample_moments(tokens, count)), moments(tokens), strict=True):
        torch.testing.assert_close(one, other)


def digest(inputs: dict[str, torch.Tensor]) -> str:
    return Sample(inputs, 1, 0, "", "", None, [], 0).digest()


def test_a_digest_is_of_everything_that_the_model_is_given():
    inputs = {"input_ids": torch.tensor([1, 2, 3]), "pixel_values": torch.zeros(1, 3, 4, 4)}
    changed = [{**inputs, "input_ids": torch.tensor([1, 2, 4])}, {**inputs, "labels": torch.tensor([1, 2, 3])}]
    changed += [
        {**inputs, "pixel_values": torch.zeros(1, 3, 2, 8)},
        {**inputs, "pixel_values": inputs["pixel_values"] + 1},
    ]
    assert len({digest(inputs), *map(digest, changed)}) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert digest(inputs) == digest(dict(reversed(inputs.items())))
