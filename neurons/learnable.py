"""Nodes whose threshold is learned: GIF neurons, and the elastic bi-spiking neuron of SpikeLM.

The threshold ``theta`` is a parameter. Charges are divided by it and the dynamics run in thresholds,
on every backend as those of :mod:`neurons.gif`. With u the charged membrane in thresholds and the
straight-through ``ds/du = 1`` within the window, a spike gives ``ds/dtheta = -(x / theta^2)`` there.
As in learned step size quantisation the gradient is scaled by ``1 / sqrt(N D)``, N the neurons that
share a threshold and D the largest spike: without it the threshold learns faster than the weights by
the number of its neurons.

Source: LSQ (arXiv 1902.08153); SpikeLM (arXiv 2406.03287) and its public code.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from neurons.backends import Reset
from neurons.gif import GIFNode, SignedGIFNode
from neurons.node import MultiLevelNode

__all__ = ["ElasticBiSpikingNode", "LearnableGIFNode", "LearnableSignedGIFNode"]

MIN_THRESHOLD = 1e-5  # in units of the input


class _Learned(MultiLevelNode):
    """What nodes with a learned threshold share; mixed in before a node's class."""

    threshold: nn.Parameter

    def _learn(self, threshold: float | Tensor | Sequence[float]) -> None:
        value = torch.as_tensor(threshold, dtype=torch.float32).detach().clone()
        valid = value.numel() > 0 and (value.is_meta or bool((value > 0).all()))
        if not valid or not (value.is_meta or bool(value.isfinite().all())):
            raise ValueError(f"threshold must be positive and finite, got {threshold}.")
        self.threshold = nn.Parameter(value)

    def effective_threshold(self, neurons: int) -> Tensor:
        """The threshold as it enters the dynamics: floored at 1e-5, gradient scaled as in LSQ.

        Args:
            neurons: N, the neurons of one step of the input.

        Returns:
            float32, of the shape of the parameter.
        """
        share = max(neurons // self.threshold.numel(), 1)
        scale = 1.0 / math.sqrt(share * (self.levels - 1))
        threshold = self.threshold.float()
        scaled = threshold * scale
        # The difference is exactly what the forward needs: the value unscaled, the gradient scaled.
        return (scaled + (threshold - scaled).detach()).clamp(min=MIN_THRESHOLD)

    def _scale(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) / self.effective_threshold(x[0].numel())

    def extra_repr(self) -> str:
        """Parameters shown by ``repr``; membranes are in units of the learned threshold."""
        return f"{super().extra_repr()}, threshold={tuple(self.threshold.shape)}"


class LearnableGIFNode(_Learned, GIFNode):
    """:class:`.GIFNode` whose firing threshold is a parameter.

    ``h[t] = decay * v[t-1] + x[t] / theta``; fire and reset are those of :class:`.GIFNode`.

    Args:
        levels: L, number of spike levels; a step emits an integer in ``0..L-1``.
        threshold: theta before training, in units of the input: one value for the layer, or values
            that broadcast to the trailing dimensions of one step (one for each channel).
        v_init: membrane before the first step, in thresholds.
        surrogate_function: as in :class:`.GIFNode`.
        detach_reset: as in :class:`.GIFNode`.
        step_mode: "s" for input ``[*]``, "m" for input ``[T, *]``.
        store_v_seq: whether to keep the membrane of every step in ``v_seq``.
        steps_per_channel: as in :class:`.GIFNode`.
        decay: as in :class:`.GIFNode`.
        backend: as in :class:`.GIFNode`.
        spike_dtype: as in :class:`.GIFNode`.
        keep_state: as in :class:`.GIFNode`.

    Attributes:
        threshold: theta, a float32 parameter.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
        ImportError: if the backend is not installed.

    Source: LSQ (arXiv 1902.08153), on the neuron of SpikeLLM (arXiv 2407.04752).
    """

    def __init__(
        self,
        levels: int = 16,
        threshold: float | Tensor | Sequence[float] = 1.0,
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
            1.0,
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
        self._learn(threshold)


class LearnableSignedGIFNode(_Learned, SignedGIFNode):
    """:class:`.SignedGIFNode` whose firing threshold is a parameter.

    ``h[t] = decay * v[t-1] + x[t] / theta``; fire and reset are those of :class:`.SignedGIFNode`.

    Args:
        levels: L, spike levels of either sign; a step emits ``-(L-1)..L-1``.
        threshold: as in :class:`LearnableGIFNode`.
        v_init: membrane before the first step, in thresholds.
        surrogate_function: as in :class:`.SignedGIFNode`.
        detach_reset: as in :class:`.GIFNode`.
        step_mode: "s" for input ``[*]``, "m" for input ``[T, *]``.
        store_v_seq: whether to keep the membrane of every step in ``v_seq``.
        steps_per_channel: as in :class:`.GIFNode`.
        decay: as in :class:`.GIFNode`.
        backend: as in :class:`.GIFNode`.
        spike_dtype: as in :class:`.GIFNode`.
        keep_state: as in :class:`.GIFNode`.

    Attributes:
        threshold: theta, a float32 parameter.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
        ImportError: if the backend is not installed.

    Source: LSQ (arXiv 1902.08153), on the neuron of SpikeLLM (arXiv 2407.04752).
    """

    def __init__(
        self,
        levels: int = 16,
        threshold: float | Tensor | Sequence[float] = 1.0,
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
            1.0,
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
        self._learn(threshold)


class ElasticBiSpikingNode(_Learned, SignedGIFNode):
    """Elastic bi-spiking neuron of SpikeLM: ternary spikes with a learned amplitude of the layer.

    With m the charged membrane and alpha the amplitude, in units of the input::

        m[t] = v[t-1] + x[t]
        s[t] = clip(round(m[t] / alpha), -1, 1)            ternary: fires where |m| > alpha / 2
        o[t] = alpha * s[t]                                output
        v[t] = decay * m[t] where s[t] = 0, else 0         no gradient through the spike

    Backward: ``do/dm = 1`` where ``|m| <= alpha``, and at one step ``do/dalpha = s - m / alpha``
    there, s elsewhere, scaled by ``1 / sqrt(N)``. The spikes are those of :class:`.SignedGIFNode`
    with ``L = 2`` in units of alpha, the reset is hard, and the leak acts between the steps.

    The output is binary in the sense of the paper: alpha goes into the weights of the next layer,
    whose inputs are then -1, 0 and 1. A smaller alpha fires more often ("elastic frequency").

    Three things differ from the public code, which resets by ``v = decay * m * (alpha - o)``, a product
    of two potentials that depends on the unit of the input and doubles after a negative spike, keeps
    one amplitude for each time step, and leaves it where :meth:`calibrate` sets it, without training.

    Args:
        amplitude: alpha before training, in units of the input; see :meth:`calibrate`.
        decay: what is left of the membrane after a step; 0.25 in the public code.
        step_mode: "s" for input ``[*]``, "m" for input ``[T, *]``.
        store_v_seq: whether to keep the membrane of every step in ``v_seq``, in units of alpha and
            before the leak.
        backend: as in :class:`.GIFNode`.
        keep_state: as in :class:`.GIFNode`.

    Attributes:
        threshold: alpha, a float32 parameter ``[]``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
        ImportError: if the backend is not installed.

    Source: SpikeLM (arXiv 2406.03287), elastic bi-spiking mechanism, and its public code.
    """

    _reset = Reset.HARD

    def __init__(
        self,
        amplitude: float = 1.0,
        decay: float = 0.25,
        step_mode: str = "s",
        store_v_seq: bool = False,
        backend: str = "auto",
        keep_state: bool = True,
    ) -> None:
        super().__init__(
            2,
            detach_reset=True,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
            decay=decay,
            backend=backend,
            keep_state=keep_state,
        )
        self._learn(amplitude)

    @torch.no_grad()
    def calibrate(self, x: Tensor, ratio: float = 2.0) -> None:
        """Set the amplitude from inputs: ``alpha = ratio * mean |x|``.

        Args:
            x: inputs of the layer, any shape.
            ratio: k; the larger, the rarer the spikes. 2 is the start of the public code.

        Raises:
            ValueError: if the inputs are all zero or not finite.
        """
        amplitude = ratio * x.float().abs().mean()
        if not 0.0 < float(amplitude) < float("inf"):
            raise ValueError(f"calibrate needs finite inputs that are not all 0, got {amplitude}.")
        self.threshold.copy_(amplitude)

    def _emit(self, spikes: Tensor, x: Tensor) -> Tensor:
        return (spikes * self.effective_threshold(x[0].numel())).to(x.dtype)
