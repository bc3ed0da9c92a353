"""Bootstrap intervals of means over questions, resampled by image, since questions on one image go together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000
AT_ONCE = 1 << 22  # weights held at one time: draws x images


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval; the ends are NaN where there are fewer than two images."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if both ends lie on one side of zero."""
        return self.low > 0 or self.high < 0


def resampled_means(images: Sequence[str], values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of columns over questions, in `draws` samples of as many images as there are, with replacement.

    Every column meets the same samples, so that differences of columns are paired.

    Args:
        images: of each question; questions with one name stay together.
        values: (questions, columns).

    Returns:
        (draws, columns).
    """
    names, place = np.unique(np.asarray(images), return_inverse=True)
    counts = np.bincount(place).astype(float)
    sums = np.stack([np.bincount(place, weights=column) for column in values.T], axis=1)
    random, found = np.random.default_rng(seed), []
    block = max(1, AT_ONCE // len(names))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        weights = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        found.append((weights @ sums) / (weights @ counts)[:, None])
    return np.concatenate(found)


def interval(value: float, drawn: np.ndarray, images: int) -> Interval:
    """Percentile interval of a figure from its resampled values."""
    if images < 2:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
