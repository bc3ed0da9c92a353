"""Cache on disk of the teacher's part in the losses, sample by sample.

A folder for each frozen model, with its settings: another model, precision or choice of layers finds nothing of the old
one. A sample is known by a digest of all that the model is given of it, so an augmented or changed one is another one.
Files are safetensors of up to `FLUSH` samples, written whole; nothing in them is executed.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.files.writing import written_whole
from lit_prune.host import Record
from lit_prune.host.parts import unwrap
from lit_prune.ops.moments import SampleMoments, sample_moments

FORM = 1
HEADER = "lit_prune_teacher"
FLUSH = 256  # samples of a file: at most so many are computed again after a kill, on each process
SAMPLED = 1024  # numbers of each weight that its fingerprint is made of
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError)


class Place(NamedTuple):
    """Row of a sample in a file, and where its visual tokens' values begin and end there."""

    path: Path
    row: int
    begin: int
    end: int


class TeacherCache(Callback):
    """Answer moments, watched attention and saliency of the teacher, by sample.

    As a callback of the Trainer it is opened when a fit begins and written when it ends, at checkpoints, at the ends of
    epochs, and every `FLUSH` samples; an epoch begins with what other processes have written. Before it is opened
    nothing is known, and nothing is kept.

    Args:
        root: folder of all caches; it may be shared by processes and runs.
    """

    def __init__(self, root: str) -> None:
        self.root, self.folder = Path(root), None
        self.layers: tuple[int, ...] = ()
        self.by_token: tuple[str, ...] = ()  # what has a value for each visual token
        self.full = False
        self.known: dict[str, Place] = {}
        self.seen: set[Path] = set()  # files read or written, damaged ones too
        self.waiting: dict[str, dict[str, Tensor]] = {}

    # -- hooks of the Trainer -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the cache for a fit, and ask the data module for digests."""
        if stage != "fit" or self.folder is not None:
            return
        if not hasattr(data := getattr(trainer, "datamodule", None), "digests"):
            raise LitPruneError(
                "model.teacher_cache: this data module can't tell its samples apart: it has no `digests`"
            )
        data.digests = True
        teaching = pl_module.teaching
        layers = sorted(teaching.sessions(1)[0].record.keep_hidden)
        read = (teaching.watch, teaching.derive)
        self.open(teaching.vlm.model, layers, *read, precision=str(trainer.precision))

    def on_train_end(self, *_: Any) -> None:
        """Write what is left."""
        self.flush()

    on_exception = on_save_checkpoint = on_train_epoch_end = on_train_end

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what other processes have written since: another epoch gives this one samples that they had."""
        if self.folder is not None and trainer.current_epoch:
            self._read_folder()

    # -- the folder ---------------------------------------------------------------------------------------------

    def open(
        self, model: nn.Module, layers: Sequence[int], watch: Sequence[int], derive: Sequence[int] = (), **settings: str
    ) -> None:
        """Read what there is for this model.

        Args:
            model: the frozen one. layers: those whose moments are kept. watch: those whose mean attention is. derive:
                those at whose inputs the saliency is. settings: what else the teacher's answers depend on.

        Raises:
            LitPruneError: the folder can't be made.
        """
        identity = {
            **settings,
            "form": FORM,
            "layers": list(layers),
            "watch": list(watch),
            **({"derive": list(derive)} if derive else {}),
            "transformers": version("transformers"),
            "model": fingerprint(model),
        }
        self.layers = tuple(layers)
        self.by_token = (*(["attention"] if watch else []), *(f"saliency.{layer}" for layer in derive))
        text = json.dumps(identity, sort_keys=True, indent=2)
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / "about.json") as file:
                file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            if not self.folder.is_dir():
                raise LitPruneError(f"model.teacher_cache: {self.folder} can't be made: {error.strerror}") from error
        self._read_folder()
        rank_zero_info(f"teacher cache {self.folder}: {len(self.known):,} samples")

    def _read_folder(self) -> None:
        """Learn what there is in files that weren't seen before."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen):
            self.seen.add(path)
            try:
                self.known |= self._rows_of(path)
            except UNREADABLE as error:
                rank_zero_warn(f"{path} is damaged and is left out, delete it: {type(error).__name__}: {error}")

    def _rows_of(self, path: Path) -> dict[str, Place]:
        """Samples of a file; raises one of `UNREADABLE` if it isn't as `flush` writes it."""
        with safe_open(path, "pt") as file:
            keys = json.loads((file.metadata() or {})[HEADER])
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            sizes = file.get_tensor("sizes")
        if not all(isinstance(key, str) for key in keys) or shapes.keys() != {*self._names(), *self.by_token}:
            raise ValueError("other contents")
        if any(shapes[name][0] != len(keys) for name in self._names()) or sizes.min() < 0:
            raise ValueError("other sizes")
        ends = sizes.cumsum(0).tolist()
        if any(shapes[name] != ends[-1:] for name in self.by_token):
            raise ValueError("other sizes")
        return {key: Place(path, i, ends[i] - int(sizes[i]), ends[i]) for i, key in enumerate(keys)}

    def _names(self) -> list[str]:
        """Tensors with a row for each sample; what has a value for each visual token is one list."""
        moments = [f"{kind}.{layer}" for layer in self.layers for kind in ("mean", "var")]
        return [*moments, "count", "sizes"]

    def flush(self) -> None:
        """Write the samples that are waiting; where that fails, say so once and go on without."""
        waiting, self.waiting = self.waiting, {}
        if not waiting or self.full:
            return
        entries, path = list(waiting.values()), self.folder / f"{uuid.uuid4().hex}.safetensors"
        tensors = {name: torch.stack([entry[name] for entry in entries]) for name in self._names()}
        tensors |= {name: torch.cat([entry[name] for entry in entries]) for name in self.by_token}
        try:
            with written_whole(path) as file:
                save_file(tensors, file, {HEADER: json.dumps(list(waiting))})
            self.known |= self._rows_of(path)
            self.seen.add(path)
        except UNREADABLE as error:
            self.full = True
            rank_zero_warn(
                f"the teacher cache {self.folder} can't be written, nothing is added to it from here: {error}"
            )

    # -- samples ------------------------------------------------------------------------------------------------

    def find(
        self, digests: Sequence[str], device: torch.device
    ) -> tuple[dict[int, SampleMoments], dict[str, Tensor]] | None:
        """Moments of each layer, and visual tokens' values by name; None unless all of a batch's samples are known."""
        entries = []
        for digest in digests:
            entry = self.waiting.get(digest) or self._read(digest)
            if entry is None:
                return None
            entries.append(entry)
        if not entries:
            return None
        stacked = {name: torch.stack([entry[name] for entry in entries]).to(device) for name in self._names()}
        kept = {i: SampleMoments(stacked["count"], stacked[f"mean.{i}"], stacked[f"var.{i}"]) for i in self.layers}
        rows = {name: [entry[name] for entry in entries] for name in self.by_token}
        pad = torch.nn.utils.rnn.pad_sequence
        return kept, {name: pad(values, batch_first=True).to(device) for name, values in rows.items()}

    def _read(self, digest: str) -> dict[str, Tensor] | None:
        place = self.known.get(digest)
        if place is None:
            return None
        try:
            file, row = _opened(place.path), slice(place.row, place.row + 1)
            entry = {name: file.get_slice(name)[row][0] for name in self._names()}
            entry |= {name: file.get_slice(name)[place.begin : place.end] for name in self.by_token}
            if all(bool(value.isfinite().all()) for value in entry.values()) and entry["count"] >= 0:
                return entry
            error = "values that are not finite"
        except UNREADABLE as found:
            error = f"{type(found).__name__}: {found}"
        gone = [key for key, other in self.known.items() if other.path == place.path]
        for key in gone:
            del self.known[key]
        rank_zero_warn(f"{place.path} is damaged and is left out, delete it: {error}")
        return None

    def add(self, digests: Sequence[str], teacher: Record) -> None:
        """Keep the samples of a teacher's record, whose `per_sample` is there."""
        if self.folder is None or self.full:
            return
        values = {}
        for layer, kept in teacher.per_sample.items():
            values |= {f"mean.{layer}": kept.mean.cpu(), f"var.{layer}": kept.var.cpu(), "count": kept.count.cpu()}
        sizes = teacher.trace.total_visual.cpu() if self.by_token else torch.zeros_like(values["count"])
        values["sizes"] = sizes
        rows = {f"saliency.{layer}": strength.cpu() for layer, strength in teacher.saliency.items()}
        if teacher.attention:
            rows["attention"] = torch.stack(list(teacher.attention.values())).mean(0).cpu()
        for i, digest in enumerate(digests):
            if digest in self.known:
                continue
            self.waiting[digest] = {name: value[i] for name, value in values.items()}
            self.waiting[digest] |= {name: values[i, : int(sizes[i])].float() for name, values in rows.items()}
        if len(self.waiting) >= FLUSH:
            self.flush()


def take_moments(teacher: Record) -> None:
    """Add the moments of each sample's answer states to a teacher's record."""
    teacher.per_sample = {layer: sample_moments(states, teacher.answers) for layer, states in teacher.hidden.items()}


@lru_cache(64)
def _opened(path: Path) -> Any:
    return safe_open(path, "pt")


def fingerprint(model: nn.Module) -> str:
    """Digest of a frozen model: its configuration, and evenly spaced numbers of each of its weights."""
    model, digest = unwrap(model), hashlib.sha256()
    digest.update(json.dumps(_plain(model.config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(str(model.config.get_text_config()._attn_implementation).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(config: Any) -> Any:
    """A configuration without what says where it is from."""
    if isinstance(config, Mapping):
        left_out = ("_name_or_path", "transformers_version")
        return {key: _plain(value) for key, value in config.items() if key not in left_out}
    return config
