"""`SpikingLinear`: a linear whose input is spikes and whose weight is integer levels, in three equal views."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from neurons import Encoding, SpikeEncoder
from neurons.functional import spikes_to_events
from snnllm.config import FLOAT_BITS, Capacity, ValueRange
from snnllm.execution import SpikingModule, View
from snnllm.hadamard import OnlineRotation
from snnllm.kernels import NativeBackend, TritonBackend, get_backend
from snnllm.kernels.epilogue import centre, in_units, kernel_threshold, scale_and_sum
from snnllm.kernels.exact import exact_matmul
from snnllm.kernels.spec import (
    Backend,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    segments_of,
    without_offset,
)
from snnllm.layout import LinearLayout
from snnllm.packing import pack, packed_width, unpack
from snnllm.precision import keeping_float32
from snnllm.transforms import salient_count
from snnllm.weights import QuantizedWeight, dequantize, run_sizes

_COLLAPSED_CAPACITY = 255
_VERSIONS = itertools.count()


class SpikingLinear(SpikingModule):
    """`y = x W^T + bias` with spiking inputs and integer weight levels (method.md section 3).

        y = sum_groups s_g * sw * sum_c (q_c - z_g) (w_c - zw) + bias

    With commensurate thresholds `s_g = m_g u`, the sums count units: `y = u * sw * sum_groups m_g sum_c ..`,
    one integer sum where the weight has one group. With `layout.offset`, a constant current
    `-offset_input` flows into the neurons, and `offset_output` is added to `y`.

    Input channels are stored in encoded order: sorted by channel group, stable. The integers inside
    the sum are the same in the three views, bit for bit, and so is `y`.

    Args:
        in_features: `K`.
        out_features: `N`.
        bias: Whether there is a bias.
        layout: Bits, steps and ranges.
        name: Name in messages, usually the module path.
        dtype: Floating dtype of the bias and of a float weight.

    Attributes:
        version: Another one whenever the stored tensors change or move, and of every linear: what was
            derived from the tensors is stale then.

    Shape:
        `[..., K]` -> `[..., N]`, in the dtype of the input.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: LinearLayout,
        name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout, self.name = layout, name
        self.backend = "auto"
        self.encoder = SpikeEncoder(
            torch.zeros(in_features, dtype=torch.uint8),
            steps=layout.steps,
            bits=layout.activation_bits if layout.activation_bits != FLOAT_BITS else 8,
            value_range=layout.value_range,
            capacity=layout.capacity,
            name=name,
            clip=layout.clip,
        )
        if layout.weight_bits == FLOAT_BITS:
            self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=dtype))
        else:
            self._make_weight()
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None
        self.rotation: OnlineRotation | None = None
        if layout.rotated is not None:
            salient = salient_count(in_features, layout.rotated)
            self.rotation = OnlineRotation((in_features - salient, salient))
        if layout.offset:
            self.register_buffer("offset_input", torch.zeros(in_features))
            self.register_buffer("offset_output", torch.zeros(out_features))
        self._spec: LinearSpec | None = None
        self._prepared: tuple[Backend, PreparedLinear] | None = None
        self.version = next(_VERSIONS)

    def _make_weight(self) -> None:
        """Register the buffers of an integer weight."""
        layout, n = self.layout, self.out_features
        groups = len(run_sizes(self.in_features, layout.group_size))
        if layout.segment_scales:
            groups = len(layout.steps)
        width = packed_width(self.in_features, layout.weight_bits)
        self.register_buffer("weight_codes", torch.zeros(n, width, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(n, groups))
        self.register_buffer("weight_zero", torch.zeros(n, groups, dtype=torch.uint8))

    # -- content -----------------------------------------------------------------------------------

    @property
    def order(self) -> Tensor:
        """Original channel of every encoded position, int64 `[K]`."""
        return torch.argsort(self.encoder.channel_group.long(), stable=True)

    def set_channel_group(self, channel_group: Tensor) -> None:
        """Choose the saliency groups (uint8 `[K]`), before the weight is set."""
        self.encoder.set_groups(channel_group)
        self.invalidate()

    def set_weight(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Store weight codes (`[N, K]` in encoded order) packed at their bit width."""
        self.weight_codes.copy_(pack(quantized.codes, self.layout.weight_bits))
        self.weight_scale.copy_(quantized.scale)
        self.weight_zero.copy_(quantized.zero)
        self._set_bias(bias)

    def set_float_weight(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Store a float weight `[N, K]` (layouts with `weight_bits=16`), original channel order."""
        self.get_buffer("weight").copy_(weight)
        self._set_bias(bias)

    def _set_bias(self, bias: Tensor | None) -> None:
        if (bias is None) != (self.bias is None):
            raise ValueError(f"{self.name}: the layer and its source disagree about a bias.")
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)
        self.invalidate()

    def set_offset(self, offset_input: Tensor, offset_output: Tensor) -> None:
        """Choose what is taken from the (rotated) input and what is added to the output."""
        self.get_buffer("offset_input").copy_(offset_input)
        self.get_buffer("offset_output").copy_(offset_output)
        self.invalidate()

    @property
    def weight_groups(self) -> int | tuple[int, ...] | None:
        """Input channels, in encoded order, that share a weight scale (`weights.run_sizes`)."""
        if not self.layout.segment_scales:
            return self.layout.group_size
        return self.group_sizes

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Input channels of every saliency group."""
        group = self.encoder.channel_group.cpu().long()
        return tuple(torch.bincount(group, minlength=len(self.layout.steps)).tolist())

    def total_bias(self) -> Tensor | None:
        """Bias and output offset, float32 `[N]`, or None."""
        bias = None if self.bias is None else self.bias.detach().float()
        offset = self._buffers.get("offset_output")
        return offset if bias is None else bias if offset is None else bias + offset

    def codes(self) -> Tensor:
        """Weight codes, uint8 `[N, K]` in encoded order."""
        codes = self.weight_codes.to(self.device)
        return unpack(codes, self.in_features, self.layout.weight_bits)

    @property
    def device(self) -> torch.device:
        """Where the linear runs; its stored codes may be in host memory (`release_codes`)."""
        return self.encoder.channel_group.device

    def dequantized_weight(self) -> Tensor:
        """The real weight that the integers stand for, float32 `[N, K]`, original channel order."""
        if self.layout.weight_bits == FLOAT_BITS:
            return self.get_buffer("weight").float()
        quantized = QuantizedWeight(self.codes(), self.weight_scale, self.weight_zero)
        encoded = dequantize(quantized, self.weight_groups)
        return torch.empty_like(encoded).index_copy_(1, self.order, encoded)

    def invalidate(self) -> None:
        """Forget everything derived from the stored tensors (after they change)."""
        self._spec = None
        self._prepared = None
        self.version = next(_VERSIONS)

    def release_codes(self) -> None:
        """Move the stored codes to host memory, once a backend has packed them for the device.

        The device holds a weight once; `state_dict`, `save_pretrained` and a move to another device
        find the codes here.
        """
        self._spec = None
        self.weight_codes = self.weight_codes.cpu()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        with keeping_float32(self):
            super()._apply(fn, recurse)
        self.invalidate()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State without what is derived from it (a backend's pointers), for deepcopy and pickle."""
        return {**self.__dict__, "_spec": None, "_prepared": None}

    def _load_from_state_dict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate()

    def extra_repr(self) -> str:
        """Bits, steps and view for `print(model)`."""
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_bits={layout.weight_bits}, "
            f"activation_bits={layout.activation_bits}, steps={layout.steps}, view={self.view}"
        )

    # -- execution ---------------------------------------------------------------------------------

    def spec(self) -> LinearSpec:
        """The integer linear for the kernels: levels in encoded order, segments, scales."""
        if self._spec is None:
            self._spec = self._build_spec()
        return self._spec

    def _build_spec(self) -> LinearSpec:
        bits = self.layout.weight_bits
        offset = 1 << (bits - 1)
        runs = torch.tensor(run_sizes(self.in_features, self.weight_groups))
        positions = torch.repeat_interleave(torch.arange(len(runs)), runs)
        return LinearSpec(
            encoder=self._encoder_spec(),
            levels=(self.codes().to(torch.int16) - offset).to(torch.int8),
            scale=self.weight_scale,
            zero=self.weight_zero.to(torch.int32) - offset,
            bias=self.total_bias(),
            segments=segments_of(self.group_sizes, positions),
            weight_bits=bits,
        )

    def _encoder_spec(self) -> EncoderSpec:
        self.encoder.check_groups()
        return EncoderSpec(
            order=self.order,
            sizes=self.group_sizes,
            capacities=tuple(self.encoder.capacities),
            shared=self.layout.value_range == ValueRange.SHARED,
            name=self.name,
            clip=tuple(self.encoder.clip.tolist()),
            commensurate=self.layout.value_range == ValueRange.COMMENSURATE,
        )

    def prepared(self) -> tuple[Backend, PreparedLinear]:
        """The collapsed backend of this layer and the weight packed for it."""
        if self._prepared is None:
            backend = get_backend(self.backend, self.device)
            self._prepared = backend, backend.prepare(self.spec())
            if backend.packs_weights:
                self.release_codes()
        return self._prepared

    def pack(self) -> None:
        """Pack the weight for its backend now, instead of in the first forward pass."""
        if FLOAT_BITS not in (self.layout.activation_bits, self.layout.weight_bits):
            self.prepared()

    def runs_in_triton(self) -> bool:
        """Whether the layer runs in kernels of Triton, which are operators of torch, once packed."""
        if FLOAT_BITS in (self.layout.activation_bits, self.layout.weight_bits):
            return False
        collapsed = self.view is View.COLLAPSED
        return collapsed and isinstance(get_backend(self.backend, self.device), TritonBackend)

    def check_view(self, view: View) -> None:
        """Refuse a view that the layout cannot run.

        Raises:
            ValueError: Naming the layer, the limit and what to change.
        """
        layout = self.layout
        if layout.activation_bits == FLOAT_BITS:
            return
        if view is not View.COLLAPSED and layout.capacity == Capacity.POWER_OF_TWO:
            raise ValueError(
                f"{self.name}: capacity='power_of_two' has counts that a T-step neuron cannot emit, "
                f"so only the collapsed view can run it, not {view}. Use capacity='steps'."
            )
        largest = max(self.encoder.capacities)
        integer = layout.weight_bits != FLOAT_BITS
        if view is View.COLLAPSED and integer and largest > _COLLAPSED_CAPACITY:
            raise ValueError(
                f"{self.name}: counts up to {largest} do not fit the 8-bit operand of the collapsed "
                f"view (limit {_COLLAPSED_CAPACITY}). Use fewer bits or steps, or the unrolled view."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear in the current view."""
        return self._forward(self._rotated(x), self._buffers.get("offset_input")).to(x.dtype)

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder sees of an input `[..., K]`: rotated and without the offset."""
        return without_offset(self._rotated(x), self._buffers.get("offset_input"))

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation(x)

    def _forward(self, x: Tensor, offset: Tensor | None) -> Tensor:
        if self.layout.activation_bits == FLOAT_BITS or self.layout.weight_bits == FLOAT_BITS:
            return self._forward_float(without_offset(x, offset))
        self.check_view(self.view)
        backend, prepared = self.prepared()
        if self.view is View.COLLAPSED:
            return backend.linear(x, prepared, offset)
        rows = without_offset(x, offset).reshape(-1, self.in_features)
        y = scale_and_sum(*self._run_neurons(rows), self.spec())
        return y.view(*x.shape[:-1], self.out_features)

    def accumulators(self, x: Tensor) -> Tensor:
        """Centred integer sums of the current view, int32 `[segments, tokens, N]`.

        The same in every view: `A[m, n] = sum_k (q[m, k] - z[m]) (w[n, k] - zw[n])`, times the
        multiple of the token and group where the thresholds are commensurate.
        """
        rows = self.encoder_input(x.reshape(-1, self.in_features))
        if self.view is View.COLLAPSED:
            backend, prepared = self.prepared()
            return backend.accumulate(rows, prepared)
        return self._run_neurons(rows)[0]

    def _run_neurons(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulators of a view over time steps and what scales them; in C while nobody watches."""
        backend, prepared = self.prepared()
        stepped = self.view is View.UNROLLED and not self.encoder.watched
        if stepped and isinstance(backend, NativeBackend):
            return backend.unrolled(rows, prepared, self.layout.steps, self.encoder.levels)
        encoding, sums = self._accumulate_steps(rows)
        return in_units(sums, encoding.multiple, self.spec()), kernel_threshold(encoding)

    def _accumulate_steps(self, rows: Tensor) -> tuple[Encoding, Tensor]:
        """Run the neurons over T steps and sum one matmul per step (or per binary event slot)."""
        spec = self.spec()
        spikes, encoding = self.encoder.encode_spikes(rows)
        if self.view is View.UNROLLED:
            return encoding, self._sum_steps(spikes, encoding.zero_point)
        order = self.order
        raw = torch.stack([self._segment_sum(spikes, spec, s, order) for s in spec.segments])
        count = encoding.count.index_select(-1, order).int()
        return encoding, centre(raw, count, encoding.zero_point, spec)

    def _sum_steps(self, spikes: Tensor, zero_point: Tensor) -> Tensor:
        """One integer matmul per step; the bias charge z is taken off once, with the first step."""
        backend, prepared = self.prepared()
        total = None
        for t, step in enumerate(spikes.to(torch.uint8)):
            firing = sum(1 << g for g, steps in enumerate(self.layout.steps) if steps > t)
            part = backend.accumulate_counts(step, zero_point, prepared, firing)
            total = part if total is None else total.add_(part)
            zero_point = torch.zeros_like(zero_point)
        assert total is not None  # an encoder has at least one step
        return total

    def _segment_sum(
        self, spikes: Tensor, spec: LinearSpec, segment: Segment, order: Tensor
    ) -> Tensor:
        """Sum over binary event slots of `events @ levels^T` on one segment, int32 `[tokens, N]`."""
        steps = self.layout.steps[segment.act_group]  # later steps are silent in this group
        train = spikes[:steps].index_select(-1, order[segment.start : segment.stop])
        train = spikes_to_events(train, self.encoder.levels)
        levels = spec.levels[:, segment.start : segment.stop]
        reach = (self.encoder.levels - 1) * (1 << (spec.weight_bits - 1)) * levels.shape[1]
        total = torch.zeros(train.shape[1], levels.shape[0], dtype=torch.int32, device=train.device)
        for step in train:
            total += exact_matmul(step, levels.T, reach)
        return total

    def _forward_float(self, x: Tensor) -> Tensor:
        """Layouts with a float operand: no integer sum exists, the spikes enter a float matmul."""
        weight = self.dequantized_weight()
        if self.layout.activation_bits == FLOAT_BITS:
            value = x.float()
        elif self.view is View.COLLAPSED:
            value = self.encoder.decode(self.encoder.encode(x), torch.float32)
        else:
            spikes, encoding = self.encoder.encode_spikes(x)
            summed = encoding._replace(count=spikes.sum(0).to(encoding.count.dtype))
            value = self.encoder.decode(summed, torch.float32)
        return nn.functional.linear(value, weight, self.total_bias()).to(x.dtype)
