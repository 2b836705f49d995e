"""What the multi-level nodes share: parameters, state, step counter, and the choice of a backend."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

from neurons import backends
from neurons.backends import Dynamics, Reset, Train, torch_backend
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = ["MultiLevelNode"]

logger = logging.getLogger(__name__)

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


@cache
def _log_choice(node: str, chosen: str, device: str) -> None:
    logger.info("%s: backend auto runs on %s for %s tensors", node, chosen, device)


class MultiLevelNode(neuron.BaseNode):
    """Base of the nodes that emit several spikes a step; the constructors are documented there."""

    v: Tensor | float
    step: Tensor | float
    steps_per_channel: Tensor | None
    # The firing rule with its default gradient, and what goes with it; set by the subclasses.
    _surrogate: ClassVar[type[GIFSpikeCount] | type[SignedSpikeCount]]
    _signed: ClassVar[bool] = False
    _reset: ClassVar[Reset] = Reset.SOFT

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
        decay: float,
        backend: str,
        spike_dtype: torch.dtype | None,
        keep_state: bool,
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
        self.decay = _check_float("decay", decay)
        self.spike_dtype, self.keep_state = spike_dtype, keep_state
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
        self._dynamics()  # checks the decay
        self._chosen = ""  # what "auto" has chosen, for repr
        self.backend = backend

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

    # ---- backend

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Backends that can run this node here: installed, and with its gradient built in.

        The kernels know the gradients of :mod:`neurons.surrogate`; another surrogate needs torch.
        """
        return backends.available_backends() if self._has_own_surrogate() else ("torch",)

    @property
    def backend(self) -> str:
        """What runs the dynamics: "auto", "torch", "triton" or "cupy"; may be set at any time.

        Raises:
            ValueError: on assignment, if there is no such backend or it lacks the surrogate.
            ImportError: on assignment, if its package is not installed.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        backends.check_backend(backend)
        self._check_gradient(backend)
        self._backend = backend

    def _check_gradient(self, backend: str) -> None:
        if backend != "auto" and backend not in self.supported_backends:
            raise ValueError(
                f"backend={backend!r} knows the gradients of neurons.surrogate only, not that of "
                f'{self.surrogate_function}; choose backend="torch".'
            )

    def _has_own_surrogate(self) -> bool:
        fire = self.surrogate_function
        return type(fire) is self._surrogate and bool(fire.spiking)

    def _choose(self, x_seq: Tensor) -> str:
        if self._backend == "auto":
            own = self._has_own_surrogate()
            chosen = backends.choose("auto", x_seq) if own else "torch"
            if self._chosen != chosen and not torch.compiler.is_compiling():
                self._chosen = chosen
                _log_choice(type(self).__name__, chosen, x_seq.device.type)
            return chosen
        self._check_gradient(self._backend)  # the surrogate may have been changed since
        return backends.choose(self._backend, x_seq)

    def _dynamics(self) -> Dynamics:
        window, fire = None, self.surrogate_function
        if self._has_own_surrogate():
            shift = 0.0 if self._signed else 0.5  # a window is centred on the spike, h on its edge
            window = (fire.grad_min + shift, fire.grad_max + shift)
        threshold, detach = self.v_threshold, self.detach_reset
        return Dynamics(
            self.levels, self._signed, threshold, self.decay, self._reset, detach, window
        )

    def _scale(self, x: Tensor) -> Tensor:
        """Input in units of `v_threshold`; a hook for thresholds that are tensors."""
        return x

    def _emit(self, spikes: Tensor, x: Tensor) -> Tensor:
        """Output made of the spikes of input x; a hook for spikes with an amplitude."""
        return spikes

    def _run(
        self,
        x_seq: Tensor,
        v: Tensor | float,
        step: Tensor | int,
        store_v_seq: bool = False,
        store_v: bool = True,
    ) -> tuple[Tensor, Train]:
        charge, steps = self._scale(x_seq), self.steps_per_channel
        dtype = self.spike_dtype or x_seq.dtype
        kernel, spec = self._choose(charge), self._dynamics()
        if kernel == "torch" and not self._has_own_surrogate():
            output, fire = backends.Output.SPIKES, self.surrogate_function
            train = torch_backend.multi_step(
                charge, spec, v, steps, step, output, dtype, store_v_seq, fire
            )
        else:
            train = backends.multi_step(
                charge,
                spec,
                v,
                steps,
                step,
                dtype=dtype,
                store_v_seq=store_v_seq,
                store_v=store_v,
                backend=kernel,
            )
        return self._emit(train.spikes, x_seq), train

    # ---- SpikingJelly's protocol

    def extra_repr(self) -> str:
        """Parameters shown by ``repr``."""
        chosen = f" ({self._chosen})" if self._backend == "auto" and self._chosen else ""
        parts = [f"levels={self.levels}, v_init={self.v_init}, {super().extra_repr()}"]
        if self.decay != 1.0:
            parts.append(f"decay={self.decay}")
        if self.steps_per_channel is not None:
            parts.append(f"steps_per_channel={tuple(self.steps_per_channel.shape)}")
        if not self.keep_state:
            parts.append("keep_state=False")
        return ", ".join([*parts, f"backend={self._backend}{chosen}"])

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

    def _states_before(self, x_seq: Tensor, states: States) -> tuple[Tensor | float, Tensor | int]:
        """Membrane and step counter that fit the input; a value for all neurons where fresh."""
        if x_seq.shape[0] == 0:
            raise ValueError("x_seq must be [T, *] with at least one time step, got T = 0.")
        self._check_input(x_seq[0])
        v, step = states
        if isinstance(v, Tensor) and v.shape != x_seq.shape[1:]:
            v, step = self.v_init, 0.0
        if isinstance(v, Tensor):
            v = v.to(dtype=torch.float32, device=x_seq.device)
        return v, step.to(x_seq.device) if isinstance(step, Tensor) else int(step)

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
        x_seq = inputs[0] if step_mode == "m" else inputs[0].unsqueeze(0)
        v, step = self._states_before(x_seq, states)
        if not isinstance(v, Tensor):
            # full_like and not full: SpikingJelly's state counter looks for it.
            v = torch.full_like(x_seq[0], v, dtype=torch.float32, requires_grad=False)
        if isinstance(step, Tensor):
            return v, step
        return v, torch.full((), step, dtype=torch.int32, device=x_seq.device)

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
        output, train = self._run(inputs[0].unsqueeze(0), *states)
        return (output[0],), (train.v, states[1] + 1)

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
        output, train = self._run(inputs[0], *states)
        return (output,), (train.v, states[1] + inputs[0].shape[0])

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all steps from the memories of the node; a fresh membrane is not materialised.

        Args:
            x_seq: charges ``[T, *]`` in real units.
            *args: part of SpikingJelly's protocol, none is used.
            **kwargs: part of SpikingJelly's protocol, none is used.

        Returns:
            Spikes ``[T, *]`` in the dtype of x_seq.
        """
        before = tuple(self._memories.values()) if self.keep_state else (self.v_init, 0.0)
        v, step = self._states_before(x_seq, before)
        output, train = self._run(x_seq, v, step, self.store_v_seq, self.keep_state)
        if self.store_v_seq:
            self.v_seq = train.v_seq
        if not self.keep_state:
            return output
        self.v, steps = train.v, x_seq.shape[0]
        if isinstance(step, Tensor):
            self.step = step + steps
        else:
            self.step = torch.full((), step + steps, dtype=torch.int32, device=x_seq.device)
        return output
