"""Dynamics of generalised integrate-and-fire (GIF) neurons as pure functions.

Every equation of the family is written here once: charge, fire and reset of one step, the loop
over the steps, the closed form of the spike count, and the conversions between counts, multi-level
spikes and binary events. Nodes, encoders and kernels call these functions or are tested against
them.

Membranes and charges count thresholds (the real value divided by the firing threshold). The soft
reset then subtracts an integer from a float32, which is exact below 2**23 thresholds, so the loop
and the closed form agree bit for bit.

Source: SpikeLLM (arXiv 2407.04752), generalised integrate-and-fire; binary slots: SpikingJelly 2.0.
"""

from collections.abc import Callable

import torch
from spikingjelly.activation_based import layer
from torch import Tensor

__all__ = [
    "FireRule",
    "count_to_spikes",
    "events_to_spikes",
    "gif_count",
    "gif_fire",
    "gif_multi_step",
    "gif_step",
    "hard_reset_step",
    "signed_events",
    "signed_gif_count",
    "signed_gif_fire",
    "signed_gif_multi_step",
    "signed_gif_step",
    "soft_reset_multi_step",
    "soft_reset_step",
    "spikes_to_count",
    "spikes_to_events",
    "to_thresholds",
]

# Map from the charged membrane h [*] (thresholds, float32) to the spikes [*], gradient included.
FireRule = Callable[[Tensor], Tensor]


def to_thresholds(x: Tensor, v_threshold: float) -> Tensor:
    """Express a charge in thresholds: ``x / v_threshold`` in float32 with IEEE division.

    Args:
        x: charge ``[*]`` in real units, any floating dtype.
        v_threshold: firing threshold, in the units of ``x``.

    Returns:
        float32 charge ``[*]``, in thresholds.
    """
    x = x.to(torch.float32)
    if v_threshold == 1.0:
        return x
    # CUDA multiplies by the reciprocal of a Python divisor; by a tensor it divides.
    return x / torch.full((), v_threshold, dtype=torch.float32, device=x.device)


def _clip_count(count: Tensor, capacity: Tensor | int) -> Tensor:
    if isinstance(capacity, Tensor):
        return torch.minimum(count.clamp(min=0), capacity.to(count.dtype))
    return count.clamp(0, capacity)


def gif_count(charge: Tensor, bias: Tensor | float, capacity: Tensor | int) -> Tensor:
    """Spike count of the unsigned neuron in closed form: ``q = clip(floor(X + bias), 0, qmax)``.

    It equals the summed spikes of T steps from ``v[-1] = bias`` with ``qmax = T*(L-1)`` when the
    charge X comes at the first step, and, where float32 adds it exactly, when ``X >= 0`` comes
    evenly or in portions that never grow.

    Args:
        charge: X, total charge ``[*]``, in thresholds, float32.
        bias: membrane before the first step, in thresholds; 1/2, or ``z + 1/2`` in an encoder.
        capacity: qmax, the largest count, an int or a tensor broadcastable to ``[*]``.

    Returns:
        Counts ``[*]``, integer valued, in the dtype of ``charge``.

    Source: SpikeLLM (arXiv 2407.04752): the GIF neuron is a rounding uniform quantiser.
    """
    return _clip_count(torch.floor(charge + bias), capacity)


def signed_gif_count(charge: Tensor, capacity: Tensor | int) -> Tensor:
    """Spike count of the signed neuron: ``q = sign(X) * clip(ceil(|X| - 1/2), 0, qmax)``.

    X rounded half toward zero (a neuron that rounds half away fires back and forth on a residual
    of exactly 1/2), clipped to ``-qmax..qmax``.

    Args:
        charge: X, total charge ``[*]``, in thresholds, float32.
        capacity: qmax, the largest magnitude, an int or a tensor broadcastable to ``[*]``.

    Returns:
        Counts ``[*]``, integer valued, in the dtype of ``charge``.

    Source: SpikeLLM (arXiv 2407.04752), bi-directional spikes.
    """
    return torch.sign(charge) * _clip_count(torch.ceil(charge.abs() - 0.5), capacity)


def gif_fire(h: Tensor, levels: int) -> Tensor:
    """Fire the unsigned neuron: ``s = clip(floor(h), 0, L-1)``.

    Args:
        h: charged membrane ``[*]``, in thresholds.
        levels: L, number of spike levels, at least 2.

    Returns:
        Spikes ``[*]`` in ``0..L-1``, in the dtype of ``h``.
    """
    return _clip_count(torch.floor(h), levels - 1)


def signed_gif_fire(h: Tensor, levels: int) -> Tensor:
    """Fire the signed neuron: ``s = sign(h) * clip(ceil(|h| - 1/2), 0, L-1)``.

    Args:
        h: charged membrane ``[*]``, in thresholds.
        levels: L, number of spike levels of either sign, at least 2.

    Returns:
        Spikes ``[*]`` in ``-(L-1)..L-1``, in the dtype of ``h``.
    """
    return signed_gif_count(h, levels - 1)


def _charge_and_fire(
    x: Tensor, v: Tensor, fire: FireRule, fires: Tensor | None, decay: float
) -> tuple[Tensor, Tensor]:
    """Charged membrane ``h = decay * v + x`` and its spikes, 0 where ``fires`` is false."""
    h = (v if decay == 1.0 else v * decay) + x.to(v.dtype)
    spike = fire(h)
    return h, spike if fires is None else spike.masked_fill(~fires, 0.0)


def soft_reset_step(
    x: Tensor,
    v: Tensor,
    fire: FireRule,
    fires: Tensor | None = None,
    detach_reset: bool = False,
    decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run one step of a neuron with soft reset.

    ``h = decay * v + x``, ``s = fire(h)`` (0 where ``fires`` is false), ``v' = h - s``.

    Args:
        x: charge of this step ``[*]``, in thresholds, any floating dtype.
        v: membrane ``[*]``, in thresholds, float32.
        fire: firing rule, from ``h`` to integer valued spikes.
        fires: bool, broadcastable to ``[*]``; where a channel may fire in this step. None: all.
        detach_reset: whether the reset keeps gradients from flowing through its spikes.
        decay: what is left of the membrane after one step; 1: no leak.

    Returns:
        Spikes ``[*]`` in the dtype of ``x``; membrane after the reset ``[*]`` in that of ``v``.

    Source: SpikeLLM (arXiv 2407.04752), generalised integrate-and-fire neuron.
    """
    h, spike = _charge_and_fire(x, v, fire, fires, decay)
    return spike.to(x.dtype), h - (spike.detach() if detach_reset else spike)


def hard_reset_step(
    x: Tensor, v: Tensor, fire: FireRule, fires: Tensor | None = None, decay: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`soft_reset_step`, but ``v' = 0`` after a spike, with no gradient through it."""
    h, spike = _charge_and_fire(x, v, fire, fires, decay)
    return spike.to(x.dtype), h.masked_fill(spike != 0, 0.0)


def soft_reset_multi_step(
    x_seq: Tensor,
    v: Tensor,
    fire: FireRule,
    steps_per_channel: Tensor | None = None,
    step: Tensor | int = 0,
    detach_reset: bool = False,
    decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run :func:`soft_reset_step` over time; a channel of n steps fires in steps ``0..n-1`` only.

    Args:
        x_seq: charges ``[T, *]``, in thresholds, any floating dtype.
        v: membrane before the first of these steps ``[*]``, in thresholds, float32.
        fire: firing rule, from ``h`` to integer valued spikes.
        steps_per_channel: integers broadcastable to ``[*]``, steps a channel may fire. None: all.
        step: index of the first of these steps (a sequence run in chunks), int or 0-d tensor.
        detach_reset: whether the reset keeps gradients from flowing through its spikes.
        decay: what is left of the membrane after one step; 1: no leak.

    Returns:
        Spikes ``[T, *]`` in the dtype of ``x_seq``; membrane after the last step ``[*]``.

    Raises:
        ValueError: if ``x_seq`` holds no time step.
    """
    if x_seq.shape[0] == 0:
        raise ValueError("x_seq must be [T, *] with at least one time step, got T = 0.")
    spikes = []
    for t in range(x_seq.shape[0]):
        fires = None if steps_per_channel is None else steps_per_channel > step + t
        spike, v = soft_reset_step(x_seq[t], v, fire, fires, detach_reset, decay)
        spikes.append(spike)
    return torch.stack(spikes), v


def gif_step(
    x: Tensor, v: Tensor, levels: int, fires: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run one step of the unsigned GIF neuron.

    Args:
        x: charge ``[*]``, in thresholds.
        v: membrane ``[*]``, in thresholds, float32; 1/2 before the first step.
        levels: L, number of spike levels.
        fires: bool, broadcastable to ``[*]``; where a channel may fire. None: all.

    Returns:
        Spikes ``[*]`` in ``0..L-1`` and the membrane after the reset ``[*]``.
    """
    return soft_reset_step(x, v, lambda h: gif_fire(h, levels), fires)


def signed_gif_step(
    x: Tensor, v: Tensor, levels: int, fires: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run one step of the signed GIF neuron: as :func:`gif_step`, spikes in ``-(L-1)..L-1``."""
    return soft_reset_step(x, v, lambda h: signed_gif_fire(h, levels), fires)


def gif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    levels: int,
    steps_per_channel: Tensor | None = None,
    step: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """Run the unsigned GIF neuron over time; arguments as in :func:`soft_reset_multi_step`.

    Args:
        x_seq: charges ``[T, *]``, in thresholds.
        v: membrane ``[*]`` before the first of these steps, in thresholds, float32.
        levels: L, number of spike levels.
        steps_per_channel: integers broadcastable to ``[*]``, steps a channel may fire. None: all.
        step: index of the first of these steps.

    Returns:
        Spikes ``[T, *]`` in ``0..L-1`` and the membrane after the last step ``[*]``.
    """
    return soft_reset_multi_step(x_seq, v, lambda h: gif_fire(h, levels), steps_per_channel, step)


def signed_gif_multi_step(
    x_seq: Tensor,
    v: Tensor,
    levels: int,
    steps_per_channel: Tensor | None = None,
    step: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """Run the signed GIF neuron over time: as :func:`gif_multi_step`, spikes ``-(L-1)..L-1``."""

    def fire(h: Tensor) -> Tensor:
        return signed_gif_fire(h, levels)

    return soft_reset_multi_step(x_seq, v, fire, steps_per_channel, step)


def count_to_spikes(
    count: Tensor, levels: int, time_steps: int, steps_per_channel: Tensor | None = None
) -> Tensor:
    """Spike train of an unsigned neuron charged at step 0: ``s[t] = clip(q - t*(L-1), 0, L-1)``.

    Args:
        count: q, spike counts ``[*]``, any integer or integer valued dtype.
        levels: L, number of spike levels, 2 to 256.
        time_steps: T, length of the train.
        steps_per_channel: integers broadcastable to ``[*]``, steps a channel may fire. None: T.

    Returns:
        uint8 spikes ``[T, *]`` in ``0..L-1``, which sum to ``count``.

    Raises:
        ValueError: if levels or time_steps are out of range, or a neuron cannot emit its count.
    """
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be 2 to 256 (spikes are uint8), got {levels}.")
    if time_steps < 1:
        raise ValueError(f"time_steps must be at least 1, got {time_steps}.")
    count = count.to(torch.int32)
    steps = time_steps if steps_per_channel is None else steps_per_channel.clamp(max=time_steps)
    if not torch.compiler.is_compiling() and ((count < 0) | (count > steps * (levels - 1))).any():
        raise ValueError(
            f"count must lie in 0..steps*(levels-1) with levels = {levels} and at most "
            f"{time_steps} steps, got {int(count.min())}..{int(count.max())}; a neuron cannot emit "
            "the others (the capacity must be that of the train, not a power of two)."
        )
    fired = torch.arange(time_steps, dtype=torch.int32, device=count.device) * (levels - 1)
    fired = fired.view(-1, *[1] * count.dim())
    return (count - fired).clamp(0, levels - 1).to(torch.uint8)


def spikes_to_count(spike_seq: Tensor) -> Tensor:
    """Sum a spike train over time: ``q = sum_t s[t]``.

    Args:
        spike_seq: spikes ``[T, *]``, integer valued, of either sign.

    Returns:
        int32 counts ``[*]``.
    """
    return spike_seq.detach().sum(0, dtype=torch.int32)  # integers carry no gradient


def spikes_to_events(spike_seq: Tensor, levels: int) -> Tensor:
    """Spread each multi-level spike over ``L-1`` binary slots: the train of the L = 2 neuron.

    Args:
        spike_seq: spikes ``[T, N, *]`` in ``0..L-1``.
        levels: L, number of spike levels.

    Returns:
        Events in {0, 1}, ``[T*(L-1), N, *]``, in the (floating) dtype of ``spike_seq``, float32
        for integer spikes.

    Source: SpikingJelly 2.0, ``layer.SpikeCountToBinary``.
    """
    events: Tensor = layer.SpikeCountToBinary(levels - 1, always_convert=True)(spike_seq)
    return events


def events_to_spikes(event_seq: Tensor, levels: int) -> Tensor:
    """Gather binary slots into multi-level spikes; inverse of :func:`spikes_to_events`.

    Args:
        event_seq: events ``[T*(L-1), N, *]``, or what a linear map made of them.
        levels: L, number of spike levels.

    Returns:
        Sums over the slots of each step, ``[T, N, *]``.

    Raises:
        ValueError: if the slots do not make whole steps.

    Source: SpikingJelly 2.0, ``layer.TemporalBinSum``.
    """
    if event_seq.shape[0] % (levels - 1):
        raise ValueError(
            f"event_seq must hold a multiple of levels - 1 = {levels - 1} slots, "
            f"got {event_seq.shape[0]}."
        )
    spikes: Tensor = layer.TemporalBinSum(levels - 1, always_convert=True)(event_seq)
    return spikes


def signed_events(centred_count: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Re-encode a centred count as ``|q - z|`` events of the sign of ``q - z``.

    ``p[i] = (i < q - z)``, ``n[i] = (i < z - q)`` for slots ``i = 0..qmax-1``, so that
    ``q - z = sum_i (p[i] - n[i])`` without a zero-point term: a channel near zero is silent.

    Args:
        centred_count: ``q - z`` ``[*]``, signed integers.
        capacity: qmax, number of slots.

    Returns:
        Positive and negative uint8 events in {0, 1}, each ``[qmax, *]``.

    Raises:
        ValueError: if a magnitude exceeds the capacity.
    """
    if not torch.compiler.is_compiling() and (centred_count.abs() > capacity).any():
        raise ValueError(
            f"centred_count must lie in -{capacity}..{capacity} (the capacity), got "
            f"{int(centred_count.min())}..{int(centred_count.max())}."
        )
    slots = torch.arange(capacity, dtype=torch.int32, device=centred_count.device)
    slots = slots.view(-1, *[1] * centred_count.dim())
    centred_count = centred_count.to(torch.int32)
    return (slots < centred_count).to(torch.uint8), (slots < -centred_count).to(torch.uint8)
