"""Generalised integrate-and-fire neurons and spike encoders for SpikingJelly 2.0."""

from neurons.backends import Dynamics, Output, Reset, Train, available_backends, multi_step
from neurons.encoder import (
    Capacity,
    Encoding,
    SpikeEncoder,
    ValueRange,
    encode_parameters,
    spike_capacity,
)
from neurons.gif import GIFNode, SignedGIFNode
from neurons.learnable import ElasticBiSpikingNode, LearnableGIFNode, LearnableSignedGIFNode
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = [
    "Capacity",
    "Dynamics",
    "ElasticBiSpikingNode",
    "Encoding",
    "GIFNode",
    "GIFSpikeCount",
    "LearnableGIFNode",
    "LearnableSignedGIFNode",
    "Output",
    "Reset",
    "SignedGIFNode",
    "SignedSpikeCount",
    "SpikeEncoder",
    "Train",
    "ValueRange",
    "available_backends",
    "encode_parameters",
    "multi_step",
    "spike_capacity",
]
