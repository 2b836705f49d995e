"""Generalised integrate-and-fire nodes for SpikingJelly 2.0.

The nodes hold parameters and state; the dynamics are those of :mod:`neurons.functional`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

from neurons import functional
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = ["GIFNode", "SignedGIFNode"]

States = tuple[Any, ...]


def _check_levels(levels: int) -> int:
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels must be an int, got {type(levels).__name__}.")
    if levels < 2:
        raise ValueError(f"levels must be at least 2 (no spike, one spike), got {levels}.")
    return levels


def _check_float(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}.")
    return float(value)


def _check_steps(steps: Tensor | Sequence[int] | None) -> Tensor | None:
    if steps is None:
        return None
    steps = torch.as_tensor(steps)
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise TypeError(f"steps_per_channel must hold integers, got {steps.dtype}.")
    if steps.numel() == 0 or (not steps.is_meta and bool((steps < 1).any())):
        raise ValueError("steps_per_channel must hold at least one channel and steps >= 1.")
    return steps.to(torch.int32)


class _MultiLevelNode(neuron.BaseNode):
    """What the unsigned and the signed node share: parameters, state, step counter, charge."""

    v: Tensor | float
    step: Tensor | float
    steps_per_channel: Tensor | None
    # The firing rule with its default gradient, set by the subclasses.
    _surrogate: ClassVar[type[GIFSpikeCount] | type[SignedSpikeCount]]

    def __init__(
        self,
        levels: int,
        v_threshold: float,
        v_init: float,
        surrogate_function: Callable[[Tensor], Tensor] | None,
        detach_reset: bool,
        step_mode: str,
        store_v_seq: bool,
        steps_per_channel: Tensor | Sequence[int] | None,
    ) -> None:
        levels = _check_levels(levels)
        v_threshold = _check_float("v_threshold", v_threshold)
        if not 0.0 < v_threshold < float("inf"):
            raise ValueError(f"v_threshold must be positive and finite, got {v_threshold}.")
        if not isinstance(detach_reset, bool):
            raise TypeError(f"detach_reset must be a bool, got {type(detach_reset).__name__}.")
        fire = surrogate_function or self._surrogate(levels - 1)
        super().__init__(v_threshold, None, fire, detach_reset, step_mode, store_v_seq)
        self.levels = levels
        self.v_init = _check_float("v_init", v_init)
        self.v = self.v_init
        self.set_reset_value("v", self.v_init)
        # A memory, not a Python counter: it follows functional forwards, chunks and resets. Float
        # sentinel until the first forward, then an int32 scalar on the device of the input.
        self.register_memory("step", 0.0)
        # A constructor argument like levels, hence not in the state dict.
        self.register_buffer("steps_per_channel", _check_steps(steps_per_channel), persistent=False)
        if surrogate_function is not None:
            self._check_surrogate(surrogate_function)

    def _check_surrogate(self, surrogate_function: Callable[[Tensor], Tensor]) -> None:
        if not getattr(surrogate_function, "spiking", True):
            return
        bound = 4 * (self.levels + 1)
        h = torch.arange(-bound, bound + 1, dtype=torch.float32, device="cpu") / 4
        with torch.no_grad():
            spikes, expected = surrogate_function(h), self._surrogate(self.levels - 1)(h)
        if not torch.equal(spikes, expected):
            raise ValueError(
                "surrogate_function must map the charged membrane (in thresholds) to the spikes of "
                f"{type(self).__name__}(levels={self.levels}), got other spikes from "
                f"{surrogate_function}; pass None, or a surrogate of neurons.surrogate with "
                f"max_spike_count = {self.levels - 1}."
            )

    def extra_repr(self) -> str:
        """Parameters shown by ``repr``."""
        steps = self.steps_per_channel
        text = f"levels={self.levels}, v_init={self.v_init}, {super().extra_repr()}"
        return text if steps is None else f"{text}, steps_per_channel={tuple(steps.shape)}"

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} expects a floating-point charge, got {x.dtype}."
            )
        if self.levels - 1 > 2 / torch.finfo(x.dtype).eps:
            raise ValueError(
                f"{x.dtype} cannot hold spikes of {self.levels} levels exactly; "
                "pass float32 or use fewer levels."
            )
        steps = self.steps_per_channel
        if steps is None:
            return
        trailing = tuple(x.shape[x.dim() - steps.dim() :]) if steps.dim() <= x.dim() else ()
        if len(trailing) != steps.dim() or any(
            n not in (1, size) for n, size in zip(steps.shape, trailing, strict=True)
        ):
            raise ValueError(
                f"steps_per_channel {tuple(steps.shape)} must broadcast to the trailing "
                f"dimensions of one step of the input, {tuple(x.shape)}."
            )

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: States, step_mode: str
    ) -> States:
        """Turn sentinels into tensors: a float32 membrane and an int32 step counter.

        A membrane of another shape than the input starts anew, and the step counter with it.

        Args:
            inputs: ``(x,)`` with x ``[*]``, or ``[T, *]`` when step_mode is "m".
            states: ``(v, step)``, tensors or the reset values.
            step_mode: "s" or "m".

        Returns:
            ``(v, step)``: float32 ``[*]`` in thresholds, int32 ``[]``.

        Raises:
            TypeError: if x is not floating point.
            ValueError: if x holds no time step, or its shape or dtype cannot carry the spikes.
        """
        x = inputs[0]
        if step_mode == "m" and x.shape[0] == 0:
            raise ValueError("x_seq must be [T, *] with at least one time step, got T = 0.")
        x = x[0] if step_mode == "m" else x
        self._check_input(x)
        v, step = states
        if isinstance(v, Tensor) and v.shape != x.shape:
            v, step = self.v_init, 0.0
        if isinstance(v, Tensor):
            v = v.to(dtype=torch.float32, device=x.device)
        else:
            # full_like and not full: SpikingJelly's state counter looks for it.
            v = torch.full_like(x, v, dtype=torch.float32, requires_grad=False)
        if isinstance(step, Tensor):
            return v, step.to(x.device)
        return v, torch.full((), int(step), dtype=torch.int32, device=x.device)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], States]:
        """Run one step without touching the memories of the node.

        Args:
            inputs: ``(x,)``, charge ``[*]`` in real units.
            states: ``(v, step)`` as :meth:`materialize_states` returns them.
            **kwargs: part of SpikingJelly's protocol, none is used.

        Returns:
            ``(spike,)`` in the dtype of x, and the new ``(v, step)``.
        """
        x, (v, step) = inputs[0], states
        charge = functional.to_thresholds(x, self.v_threshold)
        steps = self.steps_per_channel
        fires = None if steps is None else steps > step
        spike, v = functional.soft_reset_step(
            charge, v, self.surrogate_function, fires, self.detach_reset
        )
        return (spike.to(x.dtype),), (v, step + 1)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: States, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], States]:
        """Run all steps without touching the memories of the node.

        Args:
            inputs: ``(x_seq,)``, charges ``[T, *]`` in real units.
            states: ``(v, step)`` before the first of these steps.
            **kwargs: part of SpikingJelly's protocol, none is used.

        Returns:
            ``(spike_seq,)``, ``[T, *]`` in the dtype of x_seq, and the new ``(v, step)``.
        """
        x_seq, (v, step) = inputs[0], states
        spike_seq, v = functional.soft_reset_multi_step(
            functional.to_thresholds(x_seq, self.v_threshold),
            v,
            self.surrogate_function,
            self.steps_per_channel,
            step,
            self.detach_reset,
        )
        return (spike_seq.to(x_seq.dtype),), (v, step + x_seq.shape[0])


class GIFNode(_MultiLevelNode):
    """Unsigned generalised integrate-and-fire neuron with L spike levels and soft reset.

    ``h[t] = v[t-1] + x[t] / v_threshold``, ``s[t] = clip(floor(h[t]), 0, L-1)``,
    ``v[t] = h[t] - s[t]``. Over T steps the spikes sum to ``clip(floor(X + v_init), 0, T*(L-1))``
    for a charge of X thresholds: with ``v_init = 1/2`` a rounding uniform quantiser. ``L = 2`` with
    ``v_init = 0`` is the integrate-and-fire neuron.

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

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or the surrogate emits other spikes.

    Source: SpikeLLM (arXiv 2407.04752), generalised integrate-and-fire neuron.
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
        )


class SignedGIFNode(_MultiLevelNode):
    """Signed generalised integrate-and-fire neuron: a positive and a negative GIF merged.

    ``h[t] = v[t-1] + x[t] / v_threshold``,
    ``s[t] = sign(h[t]) * clip(ceil(|h[t]| - 1/2), 0, L-1)``, ``v[t] = h[t] - s[t]``. Over T steps
    the spikes sum to the charge X in thresholds, rounded half toward zero and clipped to
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

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or the surrogate emits other spikes.

    Source: SpikeLLM (arXiv 2407.04752), bi-directional spikes.
    """

    _surrogate = SignedSpikeCount

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
        )
