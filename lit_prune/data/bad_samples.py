"""Count bad samples, list them in a file, and stop the run if there are too many."""

import json
import logging
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

from lit_prune.data.dataset import error_text
from lit_prune.data.samples import Skipped
from lit_prune.errors import LitPruneError

ENOUGH = 100  # samples seen before their bad share is judged
MOST_WARNINGS = 20

log = logging.getLogger(__name__)


class BadSampleLog:
    """Counts good and bad samples pass by pass (an epoch, or one evaluation).

    Every distinct bad sample is warned about once (the first 20 of a run) and listed once in a folder, as a JSON line
    with `stage`, `file`, `sample`, `record`, `reason`, `rank`: rank 0 writes `bad_samples.jsonl`, rank 3
    `bad_samples.rank3.jsonl`. What any rank has listed there, also before a run was resumed, is not listed again.

    Args:
        max_share: largest share of bad samples among those seen in a pass, judged from 100 seen on. A smaller data set
            stops the run if it holds no good sample at all.
        folder: where to list them; None lists nowhere.
        rank: this process's rank.
    """

    def __init__(self, max_share: float, folder: Path | None = None, rank: int = 0):
        self.max_share, self.folder, self.rank = max_share, folder, rank
        self.known: set[tuple] = set()
        self._listed: set[tuple] = set()
        self._read: dict[Path, int] = {}  # how far each list was read
        self.current: Hashable = None
        self.good, self.bad = 0, set()

    @property
    def file(self) -> Path | None:
        """The list of this rank."""
        name = f"bad_samples.rank{self.rank}.jsonl" if self.rank else "bad_samples.jsonl"
        return self.folder / name if self.folder else None

    def update(self, stage: str, current: Hashable, good: int, skipped: list[Skipped], size: int) -> None:
        """Count the good and the skipped samples of a batch.

        Args:
            stage: name of the loop, such as train.
            current: key of the current pass of a stage.
            good: number of good samples in the batch, without replacements of bad ones.
            skipped: its bad samples.
            size: number of samples in a whole pass on this rank.

        Raises:
            LitPruneError: the share of bad samples is too large.
        """
        if (stage, current) != self.current:
            self.current, self.good, self.bad = (stage, current), 0, set()
        self.good += good
        for sample in skipped:
            key = (sample.file, sample.record)
            self.bad.add(key)
            if key not in self.known:
                self.known.add(key)
                self._report(stage, sample)
        seen = self.good + len(self.bad)
        too_many = seen >= ENOUGH and len(self.bad) > self.max_share * seen
        if skipped and (too_many or (seen >= size and not self.good)):
            where = f"; they are listed in {self.file}" if self.file else ""
            raise LitPruneError(
                f"{len(self.bad)} of {seen} samples seen in {stage} are bad (max_bad_share={self.max_share}){where}. "
                f"The last: {error_text(skipped[-1])}"
            )

    def _report(self, stage: str, sample: Skipped) -> None:
        if len(self.known) <= MOST_WARNINGS:
            log.warning("bad sample skipped: %s", error_text(sample))
        if len(self.known) == MOST_WARNINGS and self.file:
            log.warning("further bad samples are only listed, in %s", self.file)
        if self.file and (sample.file, sample.record) not in self._known_lists():
            line = {"stage": stage, **sample._asdict(), "rank": self.rank}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write(json.dumps(line) + "\n")

    def _known_lists(self) -> set[tuple]:
        """File and record of every line in the folder; reads only what was added since."""
        for path in sorted(self.folder.glob("bad_samples*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if line.endswith(b"\n"):  # else it is being written, or was cut short
                        self._read[path] = self._read.get(path, 0) + len(line)
                        with suppress(ValueError, KeyError, TypeError):  # nothing of ours
                            found = json.loads(line)
                            self._listed.add((found["file"], found["record"]))
        return self._listed
