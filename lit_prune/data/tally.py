"""Running counts over the training samples, for logs and warnings."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_prune.data.conversation import TOKEN_KEYS

ENOUGH = 100  # samples without any image that are worth a warning

log = logging.getLogger(__name__)


class Tally:
    """Counts training samples on this rank by source, and turns that were cut. Each warning is given once."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.cut = 0
        self._images = False
        self._warned: set[str] = set()

    def add(self, batch: dict[str, Any], cut: int) -> None:
        """Count a training batch, from whose samples `cut` turns were removed."""
        self.seen.update(batch["sources"])
        self.cut += cut
        self._images |= any(key not in TOKEN_KEYS for key in batch["inputs"])
        self.warn_without_images(ENOUGH)

    def figures(self, names: Sequence[str], bad: int, cut_turns: bool) -> dict[str, float]:
        """Values to log about the training data.

        Args:
            names: of the sources; the share of each is logged where there are several.
            bad: distinct bad samples.
            cut_turns: log the number of removed turns.
        """
        total = self.seen.total()
        shares = {f"share/{name}": self.seen[name] / total for name in names} if len(names) > 1 else {}
        return shares | ({"cut_turns": float(self.cut)} if cut_turns else {}) | {"bad": float(bad)}

    def warn_without_images(self, enough: int = 1) -> None:
        """Warn once if none of the samples so far, at least `enough`, had an image."""
        total = self.seen.total()
        if total >= enough and not self._images:
            self._warn("", f"none of the {total} samples trained on so far shows an image: nothing is learnt from them")

    def warn_of_keys(self, unread: dict[str, tuple[str, Any]]) -> None:
        """Warn once about each unread key of samples without an image; `unread`: a sample for each key."""
        for key, (file, sample) in unread.items():
            self._warn(key, f"{file}: sample {sample} has no image, and nothing reads its {key}")

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            log.warning(text)
        self._warned.add(key)
