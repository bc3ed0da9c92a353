"""Checks of data before a model is loaded: the files exist, records can be read, training data show images."""

import logging
from collections.abc import Sequence

from lit_prune.data.conversation import read_conversation
from lit_prune.data.records import image_paths
from lit_prune.data.sources import Source, spread
from lit_prune.errors import BadSample, LitPruneError, in_words

LOOKED_AT = 10_000  # records that are looked through for an image

log = logging.getLogger(__name__)


def check_sources(sources: Sequence[Source], split: str, unreadable: bool = False) -> None:
    """Look at records of the sources of a split, and warn of keys that seem to hold images which nothing reads.

    Args:
        sources: all of the split.
        split: train, val, test or predict.
        unreadable: whether a source may hold no readable record at all.

    Raises:
        LitPruneError: a source without a readable record, or training data without an image.
    """
    for source in sources:
        if not unreadable:
            _refuse_unreadable(source, answered=split != "predict")
    if split == "train" and not any(map(_shows_images, sources)):
        raise LitPruneError(_no_images(sources))
    for source in sources:
        if (keys := source.similar_keys()) and not _shows_images(source):
            log.warning("%s: no record shows an image, and nothing reads %s", source.file_of(0), ", ".join(keys))


def _refuse_unreadable(source: Source, answered: bool) -> None:
    """Raise LitPruneError if none of 64 records, evenly spaced, holds a conversation; `answered`: with an answer."""
    indices, first = spread(len(source)), None
    for index in indices:
        try:
            read_conversation(source[index], answered)
        except Exception as error:  # whatever it is, it will be a bad sample
            reason = error.reason if isinstance(error, BadSample) else in_words(error)
            first = first or f"sample {index}: {reason}"
        else:
            return
    raise LitPruneError(f"{source.file_of(0)}: none of {len(indices)} records can be read: {first}")


def _shows_images(source: Source) -> bool:
    """True if any record refers to an image; of a larger source 10,000 evenly spaced records are read."""
    return any(_images(source, index) for index in spread(len(source), LOOKED_AT))


def _no_images(sources: Sequence[Source]) -> str:
    """Error message for training data without images; names keys that look as if they held some."""
    count, looked = sum(map(len, sources)), sum(min(len(source), LOOKED_AT) for source in sources)
    some = f"{looked} of {count} records, evenly spaced," if looked < count else f"{count} records"
    keys = sorted({key for source in sources for key in source.similar_keys()})
    hint = f"; nothing reads {', '.join(f'`{key}`' for key in keys)}" if keys else ""
    return (
        f"data.train: none of {some} shows an image, and pruning learns from images alone{hint}: images stand "
        "under `image` or `images`, or in the turns"
    )


def _images(source: Source, index: int) -> int:
    try:
        return len(image_paths(source[index]))
    except Exception:  # a bad sample, whatever it is
        return 0
