"""How many time steps weight columns can have, and have on average. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MAX_STEPS = 127
"""Steps of a column whose levels fit int8."""
SCORED_STEPS = 7
"""The most that a column is given by its score."""


def check_mean_steps(mean_steps: float, salient: int | None = None) -> None:
    """Refuse a budget of steps that cannot be met.

    Args:
        mean_steps: Steps of a column on average.
        salient: Steps of the salient columns, where all others have one; None for any number by the score.

    Raises:
        ValueError: Says what is possible.
    """
    if salient is None:
        if not 1.0 <= mean_steps <= SCORED_STEPS:
            raise ValueError(
                f"mean_steps must be in 1..{SCORED_STEPS}, got {mean_steps}; more, up to {MAX_STEPS}, go "
                "with two classes of columns (salient_steps, --salient-column-steps)."
            )
    elif not 1.0 <= mean_steps <= salient <= MAX_STEPS or salient < 2:
        raise ValueError(
            f"salient columns of {salient} steps and others of one cannot average {mean_steps}; "
            f"choose 1 <= mean_steps <= steps <= {MAX_STEPS}, steps >= 2."
        )


def mean_steps_of(columns: Mapping[str, Iterable[Sequence[int]]]) -> float:
    """Steps of a column on average, from the classes `(T, columns)` of at least one linear."""
    classes = [tuple(c) for of_linear in columns.values() for c in of_linear]
    return sum(t * n for t, n in classes) / sum(n for _, n in classes)
