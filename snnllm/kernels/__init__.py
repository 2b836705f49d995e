"""Collapsed integer execution of a spiking linear (method.md, section 3) and its backends.

Use::

    spec = LinearSpec(encoder, levels, scale, zero, bias, segments, weight_bits)
    backend = get_backend("auto", torch.device("cpu"))
    prepared = backend.prepare(spec)      # once per layer
    y = backend.linear(x, prepared)       # x [.., K] -> y [.., N]
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from neurons.backends.device import interpreted
from snnllm.kernels.cpu.backend import NativeBackend
from snnllm.kernels.reference import ReferenceBackend
from snnllm.kernels.spec import (
    Backend,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    segments_of,
)
from snnllm.kernels.triton.backend import TritonBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "EncoderSpec",
    "LinearSpec",
    "NativeBackend",
    "PreparedLinear",
    "ReferenceBackend",
    "Segment",
    "TritonBackend",
    "get_backend",
    "segments_of",
]

LOGGER = logging.getLogger("snnllm.kernels")
BACKENDS = ("auto", "reference", "native", "triton")
_DEVICES = {"native": "cpu", "triton": "cuda"}
_CURES = {
    "native": "install a C compiler (e.g. gcc)",
    "triton": "run `pip install 'snnllm[triton]'` on a machine with a GPU",
}


def get_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """Return the backend that runs collapsed linears on a device.

    Args:
        name: "reference" (torch), "native" (C, CPU only), "triton" (CUDA only) or "auto": native on
            the CPU and triton on CUDA where they can run, else reference; the choice is logged once.
        device: where weights and activations live.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend was asked for and cannot run here.
    """
    device_type = torch.device(device).type
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "auto":
        return _choose(device_type)
    if name == "reference":
        return _reference()
    backend = _native() if name == "native" else _triton()
    if device_type != _DEVICES[name] and not (name == "triton" and interpreted()):
        raise RuntimeError(
            f"backend={name!r} runs on {_DEVICES[name]}, not on {device_type}; choose "
            "backend='reference'"
        )
    reason = backend.available()
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} is not available: {reason}; {_CURES[name]}, or choose "
            "backend='reference'"
        )
    return backend


@cache
def _choose(device_type: str) -> Backend:
    """Choose for "auto"; cached, so it logs once per device type."""
    for name, suits in _DEVICES.items():
        if suits != device_type:
            continue
        backend = _native() if name == "native" else _triton()
        reason = backend.available()
        if reason is None:
            LOGGER.info("collapsed linears on %s run on the %s backend", device_type, name)
            return backend
        LOGGER.warning("collapsed linears run on the slower reference backend: %s", reason)
        return _reference()
    LOGGER.info("collapsed linears on %s run on the reference backend", device_type)
    return _reference()


@cache
def _reference() -> ReferenceBackend:
    return ReferenceBackend()


@cache
def _native() -> NativeBackend:
    return NativeBackend()


@cache
def _triton() -> TritonBackend:
    return TritonBackend()
