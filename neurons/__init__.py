"""Generalised integrate-and-fire neurons and spike encoders for SpikingJelly 2.0.

The public names load on first use: who asks for a mode only need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurons.lazy import lazy_names

if TYPE_CHECKING:
    from neurons.backends import Dynamics, Output, Reset, Train, available_backends, multi_step
    from neurons.encoder import Encoding, SpikeEncoder, encode_parameters
    from neurons.gif import GIFNode, SignedGIFNode
    from neurons.learnable import ElasticBiSpikingNode, LearnableGIFNode, LearnableSignedGIFNode
    from neurons.modes import Capacity, ValueRange, spike_capacity
    from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

_MODULES = {
    "neurons.backends": (
        "Dynamics",
        "Output",
        "Reset",
        "Train",
        "available_backends",
        "multi_step",
    ),
    "neurons.encoder": ("Encoding", "SpikeEncoder", "encode_parameters"),
    "neurons.gif": ("GIFNode", "SignedGIFNode"),
    "neurons.learnable": (
        "ElasticBiSpikingNode",
        "LearnableGIFNode",
        "LearnableSignedGIFNode",
    ),
    "neurons.modes": ("Capacity", "ValueRange", "spike_capacity"),
    "neurons.surrogate": ("GIFSpikeCount", "SignedSpikeCount"),
}
_SUBMODULES = (
    "backends",
    "encoder",
    "functional",
    "gif",
    "groups",
    "learnable",
    "surrogate",
    "thresholds",
)
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_MODULE_OF |= {name: f"neurons.{name}" for name in _SUBMODULES}

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

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
