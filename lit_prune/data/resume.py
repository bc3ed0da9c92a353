"""Whether a checkpoint's training data are those given now."""

import hashlib
import json
from contextlib import suppress
from typing import Any

from lit_prune.data.records import PAIR_KEYS
from lit_prune.data.sources import Source, spread
from lit_prune.errors import BadSample, LitPruneError


def fingerprint(source: Source) -> str:
    """Tells data with the same number of records apart: a hash over ids and turns of 64 records, evenly spaced.

    So records in another order are found out; a change of a few is not, unless it hits one of these.
    """
    digest = hashlib.sha256()
    for index in spread(len(source)):
        try:
            record = source[index]
        except BadSample:
            record = {}
        told = [record.get(key) for key in ("id", "conversations", "messages")]
        if told[1:] == [None, None]:
            others = [record.get(key) for key in ("conversation", "texts", *PAIR_KEYS)]
            told += others if any(value is not None for value in others) else []
        with suppress(RecursionError):  # nested too deeply: a bad sample
            digest.update(json.dumps(told, default=str).encode())
    return digest.hexdigest()[:16]


def refuse_other_data(saved: dict[str, Any], given: dict[str, Any], what: str) -> None:
    """Compare what the order of samples depends on, key by key.

    Args:
        saved: of the checkpoint, with any other keys.
        given: of the data given now.
        what: what the checkpoint holds the state of, for the message.

    Raises:
        LitPruneError: they differ, or the checkpoint lacks a key: it is of another kind of data, or an earlier version.
    """
    for key, value in given.items():
        if saved.get(key) != value:
            raise LitPruneError(
                f"cannot resume: the checkpoint's {what} has {key} {saved.get(key)}, the data given now {value}"
            )
