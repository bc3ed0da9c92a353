"""Compare a checkpoint's training data with the current ones."""

import hashlib
import json
from contextlib import suppress
from typing import Any

from lit_prune.data.records import PAIR_KEYS
from lit_prune.data.sources import Source, spread
from lit_prune.errors import BadSample, LitPruneError


def fingerprint(source: Source) -> str:
    """Hash over ids and turns of 64 evenly spaced records, to distinguish data with equally many records.

    It detects records in another order, but a change of a few records only if it affects one of these.
    """
    digest = hashlib.sha256()
    for index in spread(len(source)):
        try:
            record = source[index]
        except BadSample:
            record = {}
        values = [record.get(key) for key in ("id", "conversations", "messages")]
        if values[1:] == [None, None]:
            others = [record.get(key) for key in ("conversation", "texts", *PAIR_KEYS)]
            values += others if any(value is not None for value in others) else []
        with suppress(RecursionError):  # nested too deeply: a bad sample
            digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()[:16]


def refuse_other_data(saved: dict[str, Any], given: dict[str, Any], what: str) -> None:
    """Compare everything that the order of samples depends on, key by key.

    Args:
        saved: values of the checkpoint; further keys are ignored.
        given: values of the current data.
        what: name of the saved state, for the message.

    Raises:
        LitPruneError: they differ, or the checkpoint lacks a key, being of another kind of data or an earlier version.
    """
    for key, value in given.items():
        if saved.get(key) != value:
            raise LitPruneError(
                f"cannot resume: the checkpoint's {what} has {key} {saved.get(key)}, the data given now {value}"
            )
