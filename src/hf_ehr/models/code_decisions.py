"""From the probability of a label to a decision: the thresholds of a configuration, and what is done with a code."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DEFAULT_THRESHOLD = 0.5
"""Of a label without a threshold, in a configuration without a common one."""
NEVER = 2.0
"""A threshold that no probability reaches; unlike infinity it can be written to JSON."""
DECISIONS = ("ignore", "review", "auto-code")


def thresholds_of(config: Any, names: Sequence[str], threshold: float | None = None) -> list[float]:
    """From where on each label counts: `threshold`, its own of the configuration, the common one, 0.5."""
    if threshold is not None:
        return [threshold] * len(names)
    common = getattr(config, "common_threshold", None)
    own = getattr(config, "thresholds", None) or {}
    return [own.get(name, DEFAULT_THRESHOLD if common is None else common) for name in names]


def stored_thresholds(
    config: Any, codes: Sequence[str], threshold: float | None = None
) -> tuple[list[float], list[float]]:
    """From where on each of the `codes` is reviewed, as [`thresholds_of`], and coded without review.

    A code without an `auto_code_thresholds` of its own is never coded without review.
    """
    auto = config.auto_code_thresholds or {}
    return thresholds_of(config, codes, threshold), [auto.get(code, NEVER) for code in codes]


def decide(scores: ArrayLike, *, review: ArrayLike, auto_code: ArrayLike) -> np.ndarray:
    """Positions in `DECISIONS`: auto-code from `auto_code` on, review from `review` on, else ignore.

    Where `auto_code` lies below `review` nothing is left to review.

    Args:
        scores: Probabilities, (…, labels).
        review: One threshold, or one a label.
        auto_code: One threshold, or one a label.

    Returns:
        int8, the shape of `scores`.
    """
    values = np.asarray(scores)
    decided = (values >= np.asarray(review, np.float64)).astype(np.int8)
    decided[values >= np.asarray(auto_code, np.float64)] = DECISIONS.index("auto-code")
    return decided
