"""Conversion pipelines: how the masks and the integer weights of a spiking LLaMA are found."""

from enum import StrEnum


class Pipeline(StrEnum):
    """The pipelines of `snnllm.convert`.

    Attributes:
        RTN: Saliency masks, weights rounded to nearest (method.md sections 2 to 4).
        ROTATED: Rotation inside the saliency groups, GPTQ weights.
        GPTQ: Weights as ternary spike trains, linears that only add (section 6).
        OMNIQUANT: Learned transformation and clipping, trained block by block (section 5).
    """

    RTN = "rtn"
    ROTATED = "rotated"
    GPTQ = "gptq"
    OMNIQUANT = "omniquant"
