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

from snnllm.kernels.native import NativeBackend
from snnllm.kernels.reference import ReferenceBackend
from snnllm.kernels.spec import (
    Backend,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    segments_of,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "EncoderSpec",
    "LinearSpec",
    "NativeBackend",
    "PreparedLinear",
    "ReferenceBackend",
    "Segment",
    "get_backend",
    "segments_of",
]

LOGGER = logging.getLogger("snnllm.kernels")
BACKENDS = ("auto", "reference", "native")


def get_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """Return the backend that runs collapsed linears on a device.

    Args:
        name: "reference" (torch), "native" (C, CPU only) or "auto": native on the CPU when it can
            be built, else reference; the choice is logged once.
        device: where weights and activations live.

    Raises:
        ValueError: unknown name.
        RuntimeError: the native backend was asked for and cannot run here.
    """
    device_type = torch.device(device).type
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "auto":
        return _choose(device_type)
    if name == "reference":
        return _reference()
    if device_type != "cpu":
        raise RuntimeError(
            f"backend='native' runs on the CPU, not on {device_type}; choose backend='reference'"
        )
    reason = _native().available()
    if reason is not None:
        raise RuntimeError(
            f"backend='native' is not available: {reason}; install a C compiler (e.g. gcc), or "
            "choose backend='reference'"
        )
    return _native()


@cache
def _choose(device_type: str) -> Backend:
    """Choose for "auto"; cached, so it logs once per device type."""
    if device_type != "cpu":
        LOGGER.info("collapsed linears on %s run on the reference backend", device_type)
        return _reference()
    reason = _native().available()
    if reason is None:
        LOGGER.info("collapsed linears on the CPU run on the native backend")
        return _native()
    LOGGER.warning("collapsed linears run on the slower reference backend: %s", reason)
    return _reference()


@cache
def _reference() -> ReferenceBackend:
    return ReferenceBackend()


@cache
def _native() -> NativeBackend:
    return NativeBackend()
