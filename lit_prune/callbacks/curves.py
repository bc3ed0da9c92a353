"""Draw the curves of a run without any logger: a PNG file, and a line for each in the terminal."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.callbacks.settings import output_suffix
from lit_prune.training.debug_modes import leaves_no_trace

MOST = 1000  # points held of each curve: above, every second one is dropped
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # characters of a curve in the terminal
SHOWN = ("loss/total", "val/accuracy/all")

Curve = list[tuple[int, float]]  # optimizer step, value


class Curves(Callback):
    """Draw losses and validation accuracy over the steps of `fit`, whatever the loggers.

    Writes `curves.png` in the run's folder, with a panel for each loss and one for accuracy, after every validation and
    at the end, and prints the total loss and the accuracy as bars. Steps are those that loggers would take
    (`trainer.log_every_n_steps`). The curves of a resumed run continue. Runs for debugging write nothing.

    Args:
        folder: where to; by default the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.curves: dict[str, Curve] = {}
        self.file: Path | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the losses of a logged step."""
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step and step % every == 0:
            self._note(trainer, step, "loss/")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy and draw."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note(trainer, trainer.global_step, "val/accuracy/all")
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and print the curves."""
        self._draw(trainer)
        shown = {name: self.curves[name] for name in SHOWN if len(self.curves.get(name, ())) > 2}
        if shown and not leaves_no_trace(trainer):
            width = max(map(len, shown))
            rank_zero_info("\n".join(f"{name:<{width}}  {bars(curve)}" for name, curve in shown.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of the resumed run."""
        self.curves = {name: [(int(x), float(y)) for x, y in curve] for name, curve in state_dict["curves"].items()}

    def _note(self, trainer: Trainer, step: int, prefix: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if not name.startswith(prefix):
                continue
            curve = self.curves.setdefault(name, [])
            if not curve or curve[-1][0] < step:
                curve.append((step, float(value)))
            if len(curve) > MOST:
                del curve[-2::-2]  # the newest stays

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or leaves_no_trace(trainer) or not self.curves:
            return
        from lit_prune.evaluation.report.curves import draw_curves  # matplotlib is slow to import

        folder = self.folder or Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"curves{output_suffix(trainer)}.png"
        draw_curves(self.curves).savefig(self.file)


def bars(curve: Curve, width: int = WIDTH) -> str:
    """A curve as one line: first value, bars of at most `width` characters (means of equal parts), last value."""
    values = [value for _, value in curve]
    count = min(width, len(values))
    ends = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    line = "".join(BARS[round((mean - low) * scale)] for mean in means)
    return f"{values[0]:.4g} {line} {values[-1]:.4g}"
