"""Whether a checkpoint's training data are those given now."""

from typing import Any

from lit_prune.errors import LitPruneError


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
