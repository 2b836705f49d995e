"""GIF neurons in Triton: one launch for all steps forward, one backward, the state in registers.

A program owns a block of neurons and walks through time; what it reads next does not depend on the
state, so the load of the next step is on its way while this one is computed. Nothing is read or
written twice. For the backward pass the forward leaves its gates, one bit of a neuron and step
(two with a hard reset), eight steps in a byte: at T = 2 that is 1 byte a neuron, where the charged
membranes would be 8, and the input need not be kept.

The integers are those of the reference: float32, division as IEEE has it, every operation in the
reference's order, no fused multiply-add (``enable_fp_fusion=False``).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.spec import Dynamics, Reset

__all__ = ["backward", "forward"]

# 8 neurons a thread: 16 byte accesses of bfloat16, two of float32.
_BLOCK = 1024
_WARPS = 4


def forward(
    x_seq: Tensor,
    v: Tensor | None,
    v_init: float,
    steps: Tensor | None,
    step: Tensor | None,
    dynamics: Dynamics,
    count: bool,
    spikes: Tensor,
    v_out: Tensor,
    v_seq: Tensor,
    gates: Tensor,
) -> None:
    """Launch the forward kernel; outputs with no element are not written.

    Args:
        x_seq: charges ``[T, *]``, in real units, contiguous, of `DTYPES`.
        v: membrane ``[*]``, float32, contiguous; None: `v_init` everywhere.
        v_init: membrane before the first step, in thresholds.
        steps: steps a channel may fire, int32, contiguous, repeated along ``[*]``. None: all.
        step: index of the first step, int32 ``[]``; None: 0.
        dynamics: the neurons.
        count: write sums over the steps.
        spikes: ``[T, *]`` or ``[*]``, written.
        v_out: ``[*]``, float32, written.
        v_seq: ``[T, *]``, float32, written.
        gates: ``[P, ceil(T / 8), *]``, uint8, written.
    """
    neurons, (lower, upper) = x_seq[0].numel(), dynamics.bounds
    launch: Any = _forward[(triton.cdiv(neurons, _BLOCK),)]
    with on(x_seq.device):
        launch(
            *(x_seq, x_seq if v is None else v, x_seq if steps is None else steps),
            *(x_seq if step is None else step, spikes, v_out, v_seq, gates),
            *(neurons, x_seq.shape[0], 1 if steps is None else steps.numel()),
            *(float(v_init), dynamics.v_threshold, dynamics.decay),
            *(dynamics.levels - 1.0, float(lower), float(upper)),
            SIGNED=dynamics.signed,
            HARD=dynamics.reset == Reset.HARD,
            DIVIDE=dynamics.v_threshold != 1.0,
            LEAKY=dynamics.decay != 1.0,
            HAS_V=v is not None,
            HAS_STEPS=steps is not None,
            HAS_STEP=step is not None,
            COUNT=count,
            STORE_V=v_out.numel() > 0,
            STORE_V_SEQ=v_seq.numel() > 0,
            GATES=gates.shape[0],
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def backward(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    gates: Tensor,
    dynamics: Dynamics,
    count: bool,
    grad_x: Tensor,
    grad_v_init: Tensor,
) -> None:
    """Launch the backward kernel.

    Args:
        grad_spikes: gradient of the spikes ``[T, *]`` or of the counts ``[*]``, contiguous, or None.
        grad_v: gradient of the last membrane ``[*]``, float32, contiguous, or None.
        grad_v_seq: gradient of all membranes ``[T, *]``, float32, contiguous, or None.
        gates: as the forward wrote them.
        dynamics: the neurons.
        count: whether the gradient is that of counts.
        grad_x: ``[T, *]``, written.
        grad_v_init: ``[*]``, float32, written if it has elements.
    """
    neurons = grad_x[0].numel()
    launch: Any = _backward[(triton.cdiv(neurons, _BLOCK),)]
    with on(grad_x.device):
        launch(
            *(gates if grad is None else grad for grad in (grad_spikes, grad_v, grad_v_seq)),
            *(gates, grad_x, grad_v_init),
            *(neurons, grad_x.shape[0], dynamics.v_threshold, dynamics.decay),
            DETACH=dynamics.detach_reset,
            HARD=dynamics.reset == Reset.HARD,
            DIVIDE=dynamics.v_threshold != 1.0,
            LEAKY=dynamics.decay != 1.0,
            COUNT=count,
            HAS_SPIKES=grad_spikes is not None,
            HAS_V=grad_v is not None,
            HAS_V_SEQ=grad_v_seq is not None,
            STORE_V=grad_v_init.numel() > 0,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _fire(h, top, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Spikes of the charged membrane h; NaN stays NaN, as in the reference."""
    raw = tl.ceil(tl.abs(h) - 0.5) if SIGNED else tl.floor(h)
    positive = tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL)
    spike = tl.minimum(positive, top, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(h < 0.0, -spike, spike) if SIGNED else spike


@triton.jit(do_not_specialize=["time_steps"])
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    v_ptr,
    steps_ptr,
    step_ptr,
    spike_ptr,
    v_out_ptr,
    v_seq_ptr,
    gate_ptr,
    neurons,
    time_steps,
    channels,
    v_init,
    threshold,
    decay,
    top,
    lower,
    upper,
    SIGNED: tl.constexpr,
    HARD: tl.constexpr,
    DIVIDE: tl.constexpr,
    LEAKY: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    HAS_STEP: tl.constexpr,
    COUNT: tl.constexpr,
    STORE_V: tl.constexpr,
    STORE_V_SEQ: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < neurons
    v = tl.zeros([BLOCK], tl.float32) + v_init
    if HAS_V:
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    if HAS_STEPS:
        # The 64-bit remainder once for the program, 32 bits for its neurons.
        channel = ((first % channels).to(tl.int32) + tl.arange(0, BLOCK)) % channels
        limit = tl.load(steps_ptr + channel)
        if HAS_STEP:
            limit -= tl.load(step_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    gate = tl.zeros([BLOCK], tl.int32)
    silent = tl.zeros([BLOCK], tl.int32)
    # Pointers walk by one step: an offset t * neurons would need 64 bits.
    x_at, spike_at, v_seq_at, gate_at = x_ptr + at, spike_ptr + at, v_seq_ptr + at, gate_ptr + at
    silent_at = gate_at + ((time_steps + 7) // 8).to(tl.int64) * neurons
    # A block, not a scalar: the interpreter masks with blocks only.
    zero = tl.zeros([BLOCK], tl.int32)
    x_next = tl.load(x_at, mask=inside, other=0.0)
    for t in range(time_steps):
        x = x_next.to(tl.float32)
        x_at += neurons
        x_next = tl.load(x_at, mask=inside & (zero + (t + 1) < time_steps), other=0.0)
        if DIVIDE:
            x = tl.div_rn(x, threshold)
        h = v * decay + x if LEAKY else v + x
        spike = _fire(h, top, SIGNED)
        if HAS_STEPS:
            spike = tl.where(limit > t, spike, 0.0)
        v = tl.where(spike == 0.0, h, 0.0) if HARD else h - spike
        if STORE_V_SEQ:
            tl.store(v_seq_at, v, mask=inside)
            v_seq_at += neurons
        if COUNT:
            total += spike
        else:
            tl.store(spike_at, spike.to(spike_ptr.dtype.element_ty), mask=inside)
            spike_at += neurons
        if GATES > 0:
            opened = (h >= lower) & (h <= upper)
            if HAS_STEPS:
                opened = opened & (limit > t)
            gate |= opened.to(tl.int32) << (t % 8)
            if GATES > 1:
                silent |= (spike == 0.0).to(tl.int32) << (t % 8)
            if (t % 8 == 7) | (t + 1 == time_steps):
                tl.store(gate_at, gate.to(tl.uint8), mask=inside)
                gate_at += neurons
                gate = tl.zeros([BLOCK], tl.int32)
                if GATES > 1:
                    tl.store(silent_at, silent.to(tl.uint8), mask=inside)
                    silent_at += neurons
                    silent = tl.zeros([BLOCK], tl.int32)
    if COUNT:
        tl.store(spike_at, total.to(spike_ptr.dtype.element_ty), mask=inside)
    if STORE_V:
        tl.store(v_out_ptr + at, v, mask=inside)


@triton.jit(do_not_specialize=["time_steps"])
def _backward(  # type: ignore[no-untyped-def]
    grad_spike_ptr,
    grad_v_ptr,
    grad_v_seq_ptr,
    gate_ptr,
    grad_x_ptr,
    grad_v_init_ptr,
    neurons,
    time_steps,
    threshold,
    decay,
    DETACH: tl.constexpr,
    HARD: tl.constexpr,
    DIVIDE: tl.constexpr,
    LEAKY: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_SPIKES: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_V_SEQ: tl.constexpr,
    STORE_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < neurons
    grad_v = tl.zeros([BLOCK], tl.float32)
    if HAS_V:
        grad_v = tl.load(grad_v_ptr + at, mask=inside, other=0.0)
    grad = tl.zeros([BLOCK], tl.float32)
    # Backward in time, from the last step and the last byte of gates.
    bytes_ = ((time_steps + 7) // 8).to(tl.int64)
    last = at + (time_steps - 1).to(tl.int64) * neurons
    gate_at = gate_ptr + at + (bytes_ - 1) * neurons
    grad_x_at, grad_v_seq_at = grad_x_ptr + last, grad_v_seq_ptr + last
    grad_spike_at = grad_spike_ptr + (at if COUNT else last)
    gate = tl.zeros([BLOCK], tl.int32)
    silent = tl.zeros([BLOCK], tl.int32)
    zero = tl.zeros([BLOCK], tl.int32)
    if HAS_SPIKES:
        grad_next = tl.load(grad_spike_at, mask=inside, other=0.0)
    for i in range(time_steps):
        t = time_steps - 1 - i
        if (i == 0) | (t % 8 == 7):
            gate = tl.load(gate_at, mask=inside, other=0).to(tl.int32)
            if HARD:
                silent = tl.load(gate_at + bytes_ * neurons, mask=inside, other=0).to(tl.int32)
            gate_at -= neurons
        opened = ((gate >> (t % 8)) & 1) != 0
        if HAS_V_SEQ:
            grad_v += tl.load(grad_v_seq_at, mask=inside, other=0.0)
            grad_v_seq_at -= neurons
        if HAS_SPIKES:
            grad = grad_next.to(tl.float32)
            if not COUNT:
                grad_spike_at -= neurons
                grad_next = tl.load(grad_spike_at, mask=inside & (zero + t > 0), other=0.0)
        if HARD:
            carried = tl.where(((silent >> (t % 8)) & 1) != 0, grad_v, 0.0)
            grad_h = carried + tl.where(opened, grad, 0.0)
        elif DETACH:
            grad_h = grad_v + tl.where(opened, grad, 0.0)
        else:
            grad_h = tl.where(opened, grad, grad_v)
        grad_x = tl.div_rn(grad_h, threshold) if DIVIDE else grad_h
        tl.store(grad_x_at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_x_at -= neurons
        grad_v = grad_h * decay if LEAKY else grad_h
    if STORE_V:
        tl.store(grad_v_init_ptr + at, grad_v, mask=inside)
