"""Generalised integrate-and-fire neurons and spike encoders for SpikingJelly 2.0."""

from neurons.encoder import (
    Capacity,
    Encoding,
    SpikeEncoder,
    ValueRange,
    encode_parameters,
    spike_capacity,
)
from neurons.gif import GIFNode, SignedGIFNode
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = [
    "Capacity",
    "Encoding",
    "GIFNode",
    "GIFSpikeCount",
    "SignedGIFNode",
    "SignedSpikeCount",
    "SpikeEncoder",
    "ValueRange",
    "encode_parameters",
    "spike_capacity",
]
