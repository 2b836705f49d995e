"""The kernels as operators of torch: fake kernels for compilation, autograd, one pair for all.

``torch.ops.neurons.gif_forward`` and ``gif_backward`` take the name of the kernels that run them,
"triton" or "cupy", so that the two differ in nothing but the launch.
"""
# No `from __future__ import annotations`: torch reads the annotations as types.

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neurons.backends.spec import Dynamics, Output, Reset, Train

__all__ = ["multi_step"]

KERNELS = {"triton": "neurons.backends.triton_gif", "cupy": "neurons.backends.cupy_gif"}


def multi_step(
    x_seq: Tensor,
    dynamics: Dynamics,
    v: Tensor | float,
    steps_per_channel: Tensor | None,
    step: Tensor | int,
    output: Output,
    dtype: torch.dtype,
    store_v_seq: bool,
    store_v: bool,
    kernel: str,
) -> Train:
    """Run the neurons in one launch; arguments as in :func:`neurons.backends.multi_step`."""
    shape = x_seq.shape[1:]
    v_init = 0.0 if isinstance(v, Tensor) else float(v)
    membrane = v.expand(shape).contiguous() if isinstance(v, Tensor) else None
    if steps_per_channel is not None:
        # Along its own axes only: the kernel repeats it over the leading ones.
        own = shape[len(shape) - steps_per_channel.dim() :]
        steps_per_channel = steps_per_channel.to(torch.int32).expand(own).contiguous()
        if not isinstance(step, Tensor) and step:
            step = torch.full((), step, dtype=torch.int32, device=x_seq.device)
    needs = x_seq.requires_grad or (membrane is not None and membrane.requires_grad)
    lower, upper = dynamics.bounds
    spikes, v_out, v_seq, _ = torch.ops.neurons.gif_forward(
        x_seq.contiguous(),
        membrane,
        steps_per_channel,
        step if isinstance(step, Tensor) and steps_per_channel is not None else None,
        v_init,
        dynamics.v_threshold,
        dynamics.decay,
        dynamics.levels,
        dynamics.signed,
        dynamics.reset == Reset.HARD,
        dynamics.detach_reset,
        lower,
        upper,
        output == Output.COUNT,
        dtype,
        store_v,
        store_v_seq,
        needs and torch.is_grad_enabled(),
        kernel,
    )
    return Train(spikes, v_out, v_seq if store_v_seq else None)


def _dynamics(
    levels: int,
    signed: bool,
    v_threshold: float,
    decay: float,
    hard_reset: bool,
    detach_reset: bool,
    window: tuple[float, float],
) -> Dynamics:
    reset = Reset.HARD if hard_reset else Reset.SOFT
    return Dynamics(levels, signed, v_threshold, decay, reset, detach_reset, window)


def _outputs(
    x_seq: Tensor,
    hard_reset: bool,
    count: bool,
    dtype: torch.dtype,
    store_v: bool,
    store_v_seq: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate spikes, last membrane, all membranes and gates; what is not stored is empty."""
    steps, *shape = x_seq.shape
    planes = (2 if hard_reset else 1) if train else 0
    return (
        x_seq.new_empty(shape if count else (steps, *shape), dtype=dtype),
        x_seq.new_empty(shape if store_v else 0, dtype=torch.float32),
        x_seq.new_empty((steps, *shape) if store_v_seq else 0, dtype=torch.float32),
        x_seq.new_empty((planes, (steps + 7) // 8, *shape), dtype=torch.uint8),
    )


@torch.library.custom_op("neurons::gif_forward", mutates_args=())
def gif_forward(
    x_seq: Tensor,
    v: Tensor | None,
    steps: Tensor | None,
    step: Tensor | None,
    v_init: float,
    v_threshold: float,
    decay: float,
    levels: int,
    signed: bool,
    hard_reset: bool,
    detach_reset: bool,
    lower: float,
    upper: float,
    count: bool,
    dtype: torch.dtype,
    store_v: bool,
    store_v_seq: bool,
    train: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, last membrane, all membranes and gates; the equations are in `spec`.

    Args:
        x_seq: charges ``[T, *]``, contiguous.
        v: membrane ``[*]``, float32, contiguous; None: `v_init`.
        steps: steps a channel may fire, int32, contiguous, of the trailing axes. None: all.
        step: index of the first step, int32 ``[]``; None: 0.
        v_init: membrane before the first step, in thresholds, where v is None.
        v_threshold: firing threshold.
        decay: what is left of the membrane after one step.
        levels: L.
        signed: negative spikes, too.
        hard_reset: a spike sets the membrane to zero.
        detach_reset: no gradient through the spikes of the reset.
        lower: lower end of the gradient's window, in thresholds.
        upper: upper end.
        count: write sums over the steps instead of spikes.
        dtype: of the spikes.
        store_v: write the last membrane.
        store_v_seq: write all membranes.
        train: write the gates, for the backward pass.
        kernel: "triton" or "cupy".

    Returns:
        Spikes ``[T, *]`` or counts ``[*]``; membrane ``[*]``; membranes ``[T, *]``; gates, uint8
        ``[P, ceil(T / 8), *]``, bit ``t % 8`` for step t, P = 0, 1 or 2 planes.
    """
    outputs = _outputs(x_seq, hard_reset, count, dtype, store_v, store_v_seq, train)
    if x_seq.numel():
        spec = _dynamics(
            levels, signed, v_threshold, decay, hard_reset, detach_reset, (lower, upper)
        )
        launch: Any = import_module(KERNELS[kernel])
        launch.forward(x_seq, v, v_init, steps, step, spec, count, *outputs)
    return outputs


@gif_forward.register_fake
def _(
    x_seq: Tensor,
    v: Tensor | None,
    steps: Tensor | None,
    step: Tensor | None,
    v_init: float,
    v_threshold: float,
    decay: float,
    levels: int,
    signed: bool,
    hard_reset: bool,
    detach_reset: bool,
    lower: float,
    upper: float,
    count: bool,
    dtype: torch.dtype,
    store_v: bool,
    store_v_seq: bool,
    train: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x_seq, hard_reset, count, dtype, store_v, store_v_seq, train)


@torch.library.custom_op("neurons::gif_backward", mutates_args=())
def gif_backward(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    gates: Tensor,
    time_steps: int,
    v_threshold: float,
    decay: float,
    hard_reset: bool,
    detach_reset: bool,
    count: bool,
    dtype: torch.dtype,
    needs_v: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the charges and of the initial membrane.

    Args:
        grad_spikes: gradient of the spikes ``[T, *]`` or counts ``[*]``.
        grad_v: gradient of the last membrane ``[*]``.
        grad_v_seq: gradient of all membranes ``[T, *]``.
        gates: as :func:`gif_forward` returns them.
        time_steps: T.
        v_threshold: firing threshold.
        decay: what is left of the membrane after one step.
        hard_reset: a spike set the membrane to zero.
        detach_reset: no gradient through the spikes of the reset.
        count: whether sums were written.
        dtype: of the charges.
        needs_v: write the gradient of the initial membrane.
        kernel: "triton" or "cupy".

    Returns:
        ``[T, *]`` in dtype; ``[*]``, float32, empty unless needs_v.
    """
    grads = _gradients(gates, time_steps, dtype, needs_v)
    if grads[0].numel():
        # The levels and the window are in the gates.
        spec = _dynamics(2, False, v_threshold, decay, hard_reset, detach_reset, (0.0, 0.0))
        given = [None if g is None else g.contiguous() for g in (grad_spikes, grad_v, grad_v_seq)]
        launch: Any = import_module(KERNELS[kernel])
        launch.backward(*given, gates, spec, count, *grads)
    return grads


def _gradients(
    gates: Tensor, time_steps: int, dtype: torch.dtype, needs_v: bool
) -> tuple[Tensor, Tensor]:
    shape = gates.shape[2:]
    grad_v = gates.new_empty(shape if needs_v else 0, dtype=torch.float32)
    return gates.new_empty((time_steps, *shape), dtype=dtype), grad_v


@gif_backward.register_fake
def _(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    gates: Tensor,
    time_steps: int,
    v_threshold: float,
    decay: float,
    hard_reset: bool,
    detach_reset: bool,
    count: bool,
    dtype: torch.dtype,
    needs_v: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return _gradients(gates, time_steps, dtype, needs_v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused membrane has no gradient to read
    ctx.save_for_backward(output[3])
    x_seq = inputs[0]
    (ctx.threshold, ctx.decay), (ctx.hard, ctx.detach) = inputs[5:7], inputs[9:11]
    ctx.count, ctx.kernel = inputs[13], inputs[18]
    ctx.steps, ctx.dtype = x_seq.shape[0], x_seq.dtype


def _differentiate(ctx: Any, grad_spikes: Any, grad_v: Any, grad_v_seq: Any, _: Any) -> Any:
    (gates,) = ctx.saved_tensors
    needs_v = ctx.needs_input_grad[1]
    nothing = [None] * 17
    if grad_spikes is None and grad_v is None and grad_v_seq is None:
        return None, None, *nothing
    grad_x, grad_v_init = torch.ops.neurons.gif_backward(
        *(grad_spikes, grad_v, grad_v_seq, gates, ctx.steps, ctx.threshold, ctx.decay),
        *(ctx.hard, ctx.detach, ctx.count, ctx.dtype, needs_v, ctx.kernel),
    )
    return grad_x, grad_v_init if needs_v else None, *nothing


gif_forward.register_autograd(_differentiate, setup_context=_keep)
