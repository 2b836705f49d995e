"""The choices that an encoder offers, by name; importing them loads no torch."""

from enum import StrEnum


class ValueRange(StrEnum):
    """Over which channels of a token the range of a group is taken."""

    SPLIT = "split"  # over the channels of the group
    SHARED = "shared"  # over all channels


class Capacity(StrEnum):
    """Largest spike count of a channel of T steps and b bits."""

    STEPS = "steps"  # T * (2**b - 1), what the neuron can emit
    POWER_OF_TWO = "power_of_two"  # 2**(b + log2 T) - 1, the published fake-quantised numbers
