"""Generalised integrate-and-fire nodes for SpikingJelly 2.0, unsigned and signed, with or without leak.

The nodes hold parameters and state; the dynamics are those of :mod:`neurons.functional`, and on a
GPU the kernels of :mod:`neurons.backends`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neurons.node import MultiLevelNode
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = ["GIFNode", "SignedGIFNode"]


class GIFNode(MultiLevelNode):
    """Unsigned generalised integrate-and-fire neuron with L spike levels and soft reset.

    ``h[t] = decay * v[t-1] + x[t] / v_threshold``, ``s[t] = clip(floor(h[t]), 0, L-1)``,
    ``v[t] = h[t] - s[t]``. Without leak (``decay = 1``), over T steps the spikes sum to
    ``clip(floor(X + v_init), 0, T*(L-1))`` for a charge of X thresholds: with ``v_init = 1/2`` a
    rounding uniform quantiser. ``L = 2`` with ``v_init = 0`` is the integrate-and-fire neuron.

    The membrane ``v`` (first memory) counts thresholds and is float32 whatever the input dtype;
    spikes have the dtype of the input. The second memory ``step`` counts the steps since reset.

    Args:
        levels: L, number of spike levels; a step emits an integer in ``0..L-1``.
        v_threshold: firing threshold, in units of the input.
        v_init: membrane before the first step, in thresholds.
        surrogate_function: map from the charged membrane (in thresholds) to spikes that carries
            the gradient; None: straight-through over the range (:class:`.GIFSpikeCount`).
        detach_reset: whether the reset keeps gradients from flowing through its spikes.
        step_mode: "s" for input ``[*]``, "m" for input ``[T, *]``.
        store_v_seq: whether to keep the membrane of every step in ``v_seq``.
        steps_per_channel: integers that broadcast to the trailing dimensions of one step; a channel
            with n fires in the first n steps after a reset only. None: no limit.
        decay: lambda, what is left of the membrane after one step, in (0, 1]; below 1 the neuron
            is leaky. In SpikingJelly's terms ``1 - 1 / tau``.
        backend: "auto" (Triton for CUDA tensors where it is installed, else torch), "torch",
            "triton" or "cupy"; a property, see :attr:`supported_backends`.
        spike_dtype: dtype of the spikes; None: that of the input. An integer (int8) is less to
            write, and carries no gradient.
        keep_state: whether a multi-step forward goes on from the membrane of the last one and leaves
            its own. False: every forward starts fresh and writes no membrane, as in networks that
            are reset after each input anyway.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or the surrogate emits other spikes.
        ImportError: if the backend is not installed.

    Source: SpikeLLM (arXiv 2407.04752), generalised integrate-and-fire neuron; the leak is that of
    I-LIF (arXiv 2407.20708), ``decay = beta``.
    """

    _surrogate = GIFSpikeCount

    def __init__(
        self,
        levels: int = 16,
        v_threshold: float = 1.0,
        v_init: float = 0.5,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        steps_per_channel: Tensor | Sequence[int] | None = None,
        decay: float = 1.0,
        backend: str = "auto",
        spike_dtype: torch.dtype | None = None,
        keep_state: bool = True,
    ) -> None:
        super().__init__(
            levels,
            v_threshold,
            v_init,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            steps_per_channel,
            decay,
            backend,
            spike_dtype,
            keep_state,
        )


class SignedGIFNode(MultiLevelNode):
    """Signed generalised integrate-and-fire neuron: a positive and a negative GIF merged.

    ``h[t] = decay * v[t-1] + x[t] / v_threshold``,
    ``s[t] = sign(h[t]) * clip(ceil(|h[t]| - 1/2), 0, L-1)``, ``v[t] = h[t] - s[t]``. Without leak
    (``decay = 1``), over T steps the spikes sum to the charge X in thresholds, rounded half toward zero and clipped to
    ``-T*(L-1)..T*(L-1)``. ``L = 2`` is a ternary neuron that fires above half a threshold.

    Args:
        levels: L, number of spike levels of either sign; a step emits ``-(L-1)..L-1``.
        v_threshold: firing threshold, in units of the input.
        v_init: membrane before the first step, in thresholds.
        surrogate_function: map from the charged membrane (in thresholds) to spikes that carries
            the gradient; None: straight-through over the range (:class:`.SignedSpikeCount`).
        detach_reset: whether the reset keeps gradients from flowing through its spikes.
        step_mode: "s" for input ``[*]``, "m" for input ``[T, *]``.
        store_v_seq: whether to keep the membrane of every step in ``v_seq``.
        steps_per_channel: as in :class:`GIFNode`.
        decay: lambda, what is left of the membrane after one step, in (0, 1]; below 1 the neuron
            is leaky. In SpikingJelly's terms ``1 - 1 / tau``.
        backend: "auto" (Triton for CUDA tensors where it is installed, else torch), "torch",
            "triton" or "cupy"; a property, see :attr:`supported_backends`.
        spike_dtype: dtype of the spikes; None: that of the input. An integer (int8) is less to
            write, and carries no gradient.
        keep_state: whether a multi-step forward goes on from the membrane of the last one and leaves
            its own. False: every forward starts fresh and writes no membrane, as in networks that
            are reset after each input anyway.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or the surrogate emits other spikes.
        ImportError: if the backend is not installed.

    Source: SpikeLLM (arXiv 2407.04752), bi-directional spikes.
    """

    _surrogate = SignedSpikeCount
    _signed = True

    def __init__(
        self,
        levels: int = 16,
        v_threshold: float = 1.0,
        v_init: float = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        steps_per_channel: Tensor | Sequence[int] | None = None,
        decay: float = 1.0,
        backend: str = "auto",
        spike_dtype: torch.dtype | None = None,
        keep_state: bool = True,
    ) -> None:
        super().__init__(
            levels,
            v_threshold,
            v_init,
            surrogate_function,
            detach_reset,
            step_mode,
            store_v_seq,
            steps_per_channel,
            decay,
            backend,
            spike_dtype,
            keep_state,
        )
