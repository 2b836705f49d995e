"""Look at what a method of an encoder receives and returns while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from neurons import SpikeEncoder

__all__ = ["observed"]


@contextmanager
def observed(
    encoder: SpikeEncoder, method: str, observe: Callable[[Tensor, Any], None]
) -> Iterator[None]:
    """Call ``observe(x, result)`` after every ``encoder.method(x)`` inside a ``with`` block.

    Attention encodes its operands by method calls, which hooks and monitors of modules do not see;
    thresholds never reach the neurons, which count in thresholds.

    Args:
        encoder: The encoder of a spiking layer.
        method: ``"encode"`` (collapsed view) or ``"encode_spikes"`` (the other views).
        observe: Gets the activations and what the method returned.
    """
    original = getattr(encoder, method)

    def wrapper(x: Tensor) -> Any:
        result = original(x)
        observe(x, result)
        return result

    setattr(encoder, method, wrapper)  # on the instance, where it hides the method of the class
    try:
        yield
    finally:
        delattr(encoder, method)
