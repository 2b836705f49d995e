"""Dynamic spike encoding of activations: a threshold and a bias charge per token and channel group.

For one token (row) and one channel group g of capacity ``qmax = T_g * (L-1)``::

    lo = min(0, min_g x)        hi = max(0, max_g x)
    s  = max((hi - lo) / qmax, 1e-5)                  threshold
    z  = clip(round(-lo / s), 0, qmax)                bias charge, round half to even
    q  = clip(floor(x / s + (z + 1/2)), 0, qmax)      spike count
    x_hat = s * (q - z)

Commensurate thresholds are these s, rounded up to multiples of one unit per token before z and q
(:func:`neurons.thresholds.commensurate`). All of it is in float32 with IEEE division and without
fused multiply-add, so that every execution of this expression (the closed form here, the neuron
step by step, a kernel) gives the same integers.

Source: SpikeLLM (arXiv 2407.04752), saliency-based spiking of LLM activations.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from neurons import backends, functional
from neurons.gif import GIFNode
from neurons.groups import ChannelGroups, check_groups, clip_factors
from neurons.modes import Capacity, ValueRange, check_commensurate, mode_of, spike_capacity
from neurons.thresholds import (
    Parameters,
    align,
    encode_parameters,
    parameters,
    per_channel,
)

__all__ = [
    "Capacity",
    "Encoding",
    "SpikeEncoder",
    "ValueRange",
    "encode_parameters",
    "spike_capacity",
]

MAX_CAPACITY = torch.iinfo(torch.int16).max


class Encoding(NamedTuple):
    """Spike counts of activations with what decodes them; channels in their original order.

    Attributes:
        count: q, spike counts ``[.., C]``, uint8 when every capacity is at most 255, else int16.
        threshold: s, firing thresholds ``[.., G]``, float32, in units of the activation.
        zero_point: z, bias charges ``[.., G]``, int32, in thresholds.
        multiple: m, the threshold in units that the groups of a token share, ``[.., G]``, int32;
            None unless the thresholds are commensurate.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    threshold: Tensor
    zero_point: Tensor
    multiple: Tensor | None = None


def _check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    if isinstance(steps, int) or any(isinstance(t, bool) or not isinstance(t, int) for t in steps):
        raise TypeError(f"steps must be a sequence of ints, one for each group, got {steps!r}.")
    if not steps or min(steps) < 1:
        raise ValueError(f"steps must hold at least one group and steps >= 1, got {tuple(steps)}.")
    return tuple(steps)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _as_groups(channel_group: Tensor | int, groups: int) -> Tensor:
    if isinstance(channel_group, int):
        if channel_group < 1:
            raise ValueError(f"channel_group as a channel count must be >= 1, got {channel_group}.")
        return torch.zeros(channel_group, dtype=torch.uint8)
    check_groups(channel_group, groups)
    return channel_group


class SpikeEncoder(ChannelGroups):
    """Encode activations as spikes of GIF neurons with dynamic thresholds, and decode them.

    The equations are those of this module's docstring. Each call starts from fresh neurons: an
    encoder carries no state from one call to the next.

    Args:
        channel_group: uint8 group of each channel, ``[C]``, or ``[H, C]`` for operands
            ``[.., H, S, C]`` with groups per head; or the number of channels, all in group 0.
        steps: T of each group, in time steps.
        bits: b, bits of one multi-level spike, 1 to 8; ``L = 2**b``.
        value_range: "split" (each group its own range), "shared", or "commensurate" (split, with
            thresholds rounded up to multiples of one unit per token, computed by torch).
        capacity: "steps", or "power_of_two" to reproduce published fake-quantised numbers, which a
            neuron cannot emit.
        name: name of the layer, for messages.
        clip: factor on the range of a token, in (0, 1], of every group or of each; 1 uses the full
            range.
        backend: what runs :meth:`encode`: "torch", "triton" (one kernel, without gradients), or
            "auto" for Triton on CUDA tensors where it is installed, no gradient is recorded and
            there are at most 16 groups, and torch otherwise. The integers are the same. Commensurate
            thresholds and their counts are always made by torch.

    Attributes:
        channel_group: the groups, a persistent uint8 buffer.
        clip: factors on the range of each group, a persistent float32 buffer ``[G]``.
        capacities: qmax of each group.
        levels: L.
        node: the :class:`.GIFNode` that :meth:`encode_spikes` runs; monitors attach to it.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
        ImportError: if the backend is not installed.
    """

    clip: Tensor

    def __init__(
        self,
        channel_group: Tensor | int,
        steps: Sequence[int] = (1,),
        bits: int = 4,
        value_range: ValueRange | str = ValueRange.SPLIT,
        capacity: Capacity | str = Capacity.STEPS,
        name: str = "",
        clip: float | Sequence[float] = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"bits must be an int, got {type(bits).__name__}.")
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {bits}.")
        self.steps = _check_steps(steps)
        self.bits, self.levels, self.name = bits, 2**bits, name
        self.value_range = mode_of(ValueRange, value_range)
        self.capacity = mode_of(Capacity, capacity)
        self.capacities = tuple(spike_capacity(t, bits, capacity) for t in self.steps)
        if max(self.capacities) > MAX_CAPACITY:
            raise ValueError(
                f"capacity {max(self.capacities)} exceeds {MAX_CAPACITY}; use fewer steps or bits."
            )
        if self.value_range == ValueRange.COMMENSURATE:
            check_commensurate(self.capacities, self._label())
        self.register_buffer("channel_group", _as_groups(channel_group, len(self.steps)))
        self.register_buffer("clip", clip_factors(clip, len(self.steps)))
        self.node = GIFNode(self.levels, step_mode="m")
        self.backend = backend

    @property
    def backend(self) -> str:
        """What runs :meth:`encode`: "auto", "torch" or "triton".

        Raises:
            ValueError: on assignment, if there is no such backend.
            ImportError: on assignment, if it is not installed.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        backends.check_encode_backend(backend)
        self._backend = backend

    def extra_repr(self) -> str:
        """Parameters shown by ``repr``."""
        shape, range_ = tuple(self.channel_group.shape), self.value_range
        return (
            f"channels={shape}, steps={self.steps}, bits={self.bits}, value_range={range_}, "
            f"backend={self.backend}, {self.name!r}"
        )

    @property
    def watched(self) -> bool:
        """Whether someone records from the neurons: hooks, ``store_v_seq``, or a wrapped method."""
        node: Any = self._modules["node"]  # without the detour of `Module.__getattr__`
        if node._forward_hooks or node._forward_pre_hooks or node.store_v_seq:
            return True
        own = self.__dict__
        return "encode" in own or "encode_spikes" in own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        clip = self.clip
        super()._apply(fn, recurse)
        if self.clip.dtype != torch.float32:  # `.half()` would round the thresholds
            self.clip = clip.to(self.clip.device)
        return self

    def _label(self) -> str:
        return self.name or type(self).__name__

    def _check_input(self, x: Tensor) -> None:
        shape, groups = tuple(x.shape), tuple(self.channel_group.shape)
        if not x.is_floating_point():
            raise TypeError(f"{self._label()}: expected floating-point activations, got {x.dtype}.")
        # The axes that the groups describe: channels, and heads (two axes further left) if any.
        if shape[-1::-2][: len(groups)] != groups[::-1]:
            axes = "[.., C]" if len(groups) == 1 else "[.., H, S, C]"
            raise ValueError(
                f"{self._label()}: expected activations {axes} for channel groups {groups}, "
                f"got {shape}."
            )

    def _parameters_of(self, x: Tensor) -> Parameters:
        found = parameters(x, self.channel_group, self.capacities, self.value_range, self.clip)
        self._check_finite(found.threshold)
        return found

    def _check_finite(self, threshold: Tensor) -> None:
        # The check waits for the device, which a graph under capture does not allow.
        if torch.compiler.is_compiling() or _is_capturing(threshold):
            return
        # NaN and inf reach the threshold of their row, so this small tensor tells for all of x.
        if not bool(torch.isfinite(threshold).all()):
            raise ValueError(
                f"{self._label()}: activations hold NaN or inf, or a range beyond float32; "
                "check the weights and the input of this layer."
            )

    def _charge(self, x: Tensor) -> tuple[Tensor, Tensor, Parameters]:
        """Charge ``x / s`` [.., C] and bias ``z + 1/2``, with the parameters they come from."""
        self._check_input(x)
        found = self._parameters_of(x)
        group = align(self.channel_group)
        charge = x.to(torch.float32) / per_channel(found.threshold, group)
        bias = per_channel(found.zero_point.to(torch.float32) + 0.5, group)
        return charge, bias, found

    def _compact(self, count: Tensor) -> Tensor:
        return count.to(torch.uint8 if max(self.capacities) <= 255 else torch.int16)

    def encode(self, x: Tensor) -> Encoding:
        """Encode by the closed form, ``q = clip(floor(x / s + (z + 1/2)), 0, qmax)``.

        Args:
            x: activations ``[.., C]`` (``[.., H, S, C]`` with groups per head), any float dtype.

        Returns:
            Counts, thresholds and bias charges.

        Raises:
            TypeError: if x is not floating point.
            ValueError: if the channels do not match, x holds NaN or inf (names the layer; not
                checked under ``torch.compile`` and in CUDA graphs), or the backend cannot take x.
        """
        self._check_input(x)
        groups = len(self.steps)
        by_torch = self.value_range == ValueRange.COMMENSURATE
        if not by_torch and backends.choose_encode(self.backend, x, groups) == "triton":
            shared = self.value_range == ValueRange.SHARED
            encoding = backends.encode(x, self.channel_group, self.capacities, self.clip, shared)
            self._check_finite(encoding[1])
            return Encoding(*encoding)
        charge, bias, found = self._charge(x)
        capacity: Tensor | int = self.capacities[0]
        if len(self.capacities) > 1:
            capacities = torch.tensor(self.capacities, dtype=torch.float32, device=x.device)
            capacity = per_channel(capacities, align(self.channel_group))
        count = functional.gif_count(charge, bias, capacity)
        return Encoding(self._compact(count), *found)

    forward = encode

    def encode_spikes(self, x: Tensor) -> tuple[Tensor, Encoding]:
        """Encode by running the neurons: charge ``x / s`` at step 0, ``v[-1] = z + 1/2``.

        The node is called as a module, so that its hooks, monitors and ``store_v_seq`` work.

        Args:
            x: activations ``[.., C]`` (``[.., H, S, C]`` with groups per head), any float dtype.

        Returns:
            float32 spikes ``[T, .., C]`` in ``0..L-1``, T the most steps of a group; the encoding,
            whose counts are the summed spikes and equal those of :meth:`encode`.

        Raises:
            TypeError: if x is not floating point.
            ValueError: if the channels do not match, x holds NaN or inf, or the capacity is
                "power_of_two", which T steps cannot emit.
        """
        if self.capacity != Capacity.STEPS:
            raise ValueError(
                f"{self._label()}: neurons cannot emit the capacity {self.capacity}; "
                'use capacity="steps", or encode() for the fake-quantised numbers.'
            )
        charge, bias, found = self._charge(x)
        x_seq = charge.new_zeros((max(self.steps), *charge.shape))
        x_seq[0] = charge
        spike_seq = self._run_node(x_seq, bias.expand_as(charge))
        count = self._compact(functional.spikes_to_count(spike_seq))
        return spike_seq, Encoding(count, *found)

    def _run_node(self, x_seq: Tensor, v: Tensor) -> Tensor:
        # Set here, not in __init__: channel_group may come from a checkpoint later.
        self.node.steps_per_channel = None
        if len(self.steps) > 1:
            steps = torch.tensor(self.steps, dtype=torch.int32, device=x_seq.device)
            self.node.steps_per_channel = per_channel(steps, align(self.channel_group))
        self.node.reset()
        self.node.v = v
        spike_seq: Tensor = self.node(x_seq)
        # Drop the membrane, which would stay in memory for every layer of a model; v_seq stays.
        self.node.v = self.node.v_init
        return spike_seq

    def centre(self, encoding: Encoding) -> Tensor:
        """Centred counts ``q - z``: the signed number of events, 0 for x = 0.

        Args:
            encoding: from this encoder.

        Returns:
            int16 ``[.., C]``.
        """
        zero_point = per_channel(encoding.zero_point.to(torch.int16), align(self.channel_group))
        return encoding.count.to(torch.int16) - zero_point

    def decode(self, encoding: Encoding, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode counts: ``x_hat = s * (q - z)``, in float32 and then rounded to dtype.

        Args:
            encoding: from this encoder.
            dtype: floating dtype of the result.

        Returns:
            ``x_hat`` ``[.., C]``, in units of the activation.
        """
        threshold = per_channel(encoding.threshold, align(self.channel_group))
        return (threshold * self.centre(encoding)).to(dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Encode and decode ``x`` with a straight-through gradient: ``x_hat``, ``dx_hat/dx = 1``."""
        x_hat = self.decode(self.encode(x.detach()), x.dtype)
        return x_hat + (x - x.detach())
