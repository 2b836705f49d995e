"""The choices that an encoder offers, by name, and what they allow; importing them loads no torch."""

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

M = TypeVar("M", bound=StrEnum)
LARGEST_CHARGE = 255
"""Largest spike count in units, ``m_g * q``, of commensurate thresholds: what a byte holds."""
COMMENSURATE_CAPACITY = 63
"""Largest capacity of groups with commensurate thresholds: multiples up to 4 fit a byte."""


class ValueRange(StrEnum):
    """Over which channels of a token the range of a group is taken."""

    SPLIT = "split"  # over the channels of the group
    SHARED = "shared"  # over all channels
    COMMENSURATE = "commensurate"  # over the group, thresholds multiples of one unit per token

    @property
    def code(self) -> int:
        """What kernels know the range by: 0 split, 1 shared, 2 commensurate."""
        return list(ValueRange).index(self)


class Capacity(StrEnum):
    """Largest spike count of a channel of T steps and b bits."""

    STEPS = "steps"  # T * (2**b - 1), what the neuron can emit
    POWER_OF_TWO = "power_of_two"  # 2**(b + log2 T) - 1, the published fake-quantised numbers


def mode_of(kind: type[M], value: str) -> M:
    """The member of an enum by its value; ValueError names the values there are."""
    if isinstance(value, kind):
        return value
    for mode in kind:
        if mode == value:
            return mode
    raise ValueError(f"expected one of {[str(mode) for mode in kind]}, got {value!r}.")


def spike_capacity(steps: int, bits: int, capacity: Capacity | str = Capacity.STEPS) -> int:
    """Largest spike count: ``T * (2**b - 1)``, or ``2**(b + log2 T) - 1`` as published.

    Args:
        steps: T, time steps a channel may fire.
        bits: b, bits of one multi-level spike.
        capacity: which of the two rules.

    Returns:
        qmax.

    Raises:
        ValueError: if the rule is unknown, or "power_of_two" meets steps that are none.
    """
    if mode_of(Capacity, capacity) == Capacity.STEPS:
        return int(steps * (2**bits - 1))
    if steps & (steps - 1):
        raise ValueError(f'capacity="power_of_two" needs steps 1, 2, 4, ..., got {steps}.')
    return int(steps * 2**bits - 1)


def check_commensurate(capacities: Sequence[int], name: str = "encoder") -> None:
    """Refuse capacities of two or more groups that have no commensurate thresholds.

    Raises:
        ValueError: if a capacity exceeds 63, or the last group does not have the largest.
    """
    if len(capacities) < 2:
        return
    if max(capacities) > COMMENSURATE_CAPACITY:
        raise ValueError(
            f"{name}: commensurate thresholds of several channel groups need capacities of at most "
            f"{COMMENSURATE_CAPACITY}, got {tuple(capacities)}; use fewer bits or steps, or the "
            "range split."
        )
    if max(capacities) != capacities[-1]:
        raise ValueError(
            f"{name}: commensurate thresholds need the largest capacity in the last channel group, "
            f"got {tuple(capacities)}; order the groups by steps, or use the range split."
        )
