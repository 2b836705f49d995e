"""`TernaryLinear`: a linear whose weight is ternary spike trains, with float or spiking inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurons import Encoding
from snnllm.additive import AdditiveWork, additive_sums, fixed_point
from snnllm.config import FLOAT_BITS, ValueRange
from snnllm.execution import View
from snnllm.kernels import TritonBackend, get_backend
from snnllm.kernels.epilogue import centre, scale_and_sum
from snnllm.kernels.exact import exact_matmul
from snnllm.kernels.spec import LinearSpec, Segment, segments_of, without_offset
from snnllm.kernels.ternary.pack import (
    CountedTernary,
    PackedTernary,
    count_with,
    counted_linear,
    exact_in_float,
    pack_ternary,
    packed_linear,
)
from snnllm.linear import SpikingLinear
from snnllm.packing import digits_width, pack_digits, unpack_digits
from snnllm.step_allocation import column_steps, threshold_runs
from snnllm.ternary import TernaryWeight, weight_spikes
from snnllm.weights import QuantizedWeight, expand_groups

_INT16_CHANNELS = 1 << 15
_MOST_GROUPS = 16
"""Most saliency groups that the encoder's kernel knows in the original order of the channels."""


class TernaryLinear(SpikingLinear):
    """`y = x W^T + bias` with `w[n, c] = alpha[n, j] sum_t s_t[n, c]` (method.md section 6).

    Weights are stored class by class (columns with the same number of steps T, T ascending) as digits
    of base `2 T + 1`, five trits in a byte for T = 1; thresholds as float16, one per row and run of
    columns; and the channel of every stored column.

    The three views add the same integers and give the same accumulators bit for bit:

    - `binary`: weight spikes add or subtract activations, nothing is multiplied (`snnllm.additive`);
    - `unrolled`: one ternary matmul per step of the weights (and of the activations);
    - `collapsed`: small signed integers, in the integer kernels of the other spiking linears.

    Float inputs (`activation_bits=16`) are taken as integers on a grid of a power of two per token
    (`additive.fixed_point`) in the first two views; the collapsed view sums them in float32, which is the
    same up to its rounding. On a GPU the weight stays packed in memory, two bits a spike
    (`kernels.ternary.pack`); elsewhere its float32 form is kept once it is needed, until `invalidate`.

    Arguments as those of `SpikingLinear`; `layout.classes` says how many columns have how many steps.

    Raises:
        ValueError: The classes do not hold every column, or the inputs are commensurate.
    """

    weight_threshold: Tensor
    weight_order: Tensor

    def _make_weight(self) -> None:
        classes, n, k = self.layout.classes, self.out_features, self.in_features
        if self.layout.value_range == ValueRange.COMMENSURATE:
            raise ValueError(
                f"{self.name}: ternary weights have no commensurate inputs; use split."
            )
        if sum(c.columns for c in classes) != k:
            raise ValueError(
                f"{self.name}: weight_columns {tuple(map(tuple, classes))} do not hold the {k} input "
                "channels; only the gptq and the rotated pipeline fill ternary weights."
            )
        width = sum(digits_width(c.columns, 2 * c.steps + 1) for c in classes)
        self.register_buffer("weight_codes", torch.zeros(n, width, dtype=torch.uint8))
        runs = len(threshold_runs(classes, self.layout.group_size))
        # The bits of float16 values as integers, which no change of the model's dtype touches.
        self.register_buffer("weight_threshold", torch.zeros(n, runs, dtype=torch.int16))
        kind = torch.int16 if k <= _INT16_CHANNELS else torch.int32
        self.register_buffer("weight_order", torch.arange(k, dtype=kind))
        self._levels: Tensor | None = None
        self._packed_weight: PackedTernary | CountedTernary | None = None
        self._dense_weight: Tensor | None = None
        self.additive_work: AdditiveWork | None = None

    # -- content -----------------------------------------------------------------------------------

    def set_weight(
        self, quantized: TernaryWeight | QuantizedWeight, bias: Tensor | None = None
    ) -> None:
        """Store ternary spike trains.

        Raises:
            TypeError: Uniform levels.
            ValueError: Other classes than the layout has.
        """
        if not isinstance(quantized, TernaryWeight):
            raise TypeError(
                f"{self.name}: expected a TernaryWeight, got {type(quantized).__name__}."
            )
        if quantized.classes != self.layout.classes:
            raise ValueError(
                f"{self.name}: the weight has classes {quantized.classes}, the layer "
                f"{self.layout.classes}."
            )
        packed, start = [], 0
        for steps, columns in quantized.classes:
            digits = quantized.levels[:, start : start + columns].to(torch.int16) + steps
            packed.append(pack_digits(digits, 2 * steps + 1))
            start += columns
        self.weight_codes.copy_(torch.cat(packed, 1))
        self.weight_threshold.copy_(quantized.threshold.view(torch.int16))
        self.weight_order.copy_(quantized.order)
        self._set_bias(bias)

    @property
    def order(self) -> Tensor:
        """Original channel of every encoded position: by channel group, then as stored."""
        stored = self.weight_order.long()
        return stored[self._by_group]

    @property
    def _by_group(self) -> Tensor:
        """Stored column of every encoded position, int64 `[K]`."""
        group = self.encoder.channel_group.long()[self.weight_order.long()]
        return torch.argsort(group, stable=True)

    def levels(self) -> Tensor:
        """Spike counts of the weights in stored order, int8 `[N, K]`; kept once unpacked."""
        if self._levels is None:
            self._levels = self._unpacked()
        return self._levels

    def _unpacked(self) -> Tensor:
        """Spike counts of the weights in stored order, int8 `[N, K]`."""
        parts, start = [], 0
        for steps, columns in self.layout.classes:
            width = digits_width(columns, 2 * steps + 1)
            packed = self.weight_codes[:, start : start + width].to(self.device)
            digits = unpack_digits(packed, columns, 2 * steps + 1)
            parts.append((digits.to(torch.int16) - steps).to(torch.int8))
            start += width
        return torch.cat(parts, 1)

    def codes(self) -> Tensor:
        """Spike counts of the weights in encoded order, int8 `[N, K]`."""
        return self.levels()[:, self._by_group]

    def threshold(self) -> Tensor:
        """Thresholds of the weights, float32 `[N, J]`."""
        return self.weight_threshold.view(torch.float16).float()

    def dequantized_weight(self) -> Tensor:
        """The real weight that the spikes stand for, float32 `[N, K]`, original channel order."""
        runs = threshold_runs(self.layout.classes, self.layout.group_size)
        weight = self._unpacked().float() * expand_groups(self.threshold(), self.in_features, runs)
        return torch.empty_like(weight).index_copy_(1, self.weight_order.long(), weight)

    def packed_weight(self) -> PackedTernary | CountedTernary | None:
        """The weight as a GPU reads it, kept until `invalidate`; None where others run the layer."""
        if self._packed_weight is None and self._on_triton():
            packed = pack_ternary(
                self._unpacked(),
                self.weight_threshold.view(torch.float16),
                self.weight_order,
                self.layout.classes,
                self.layout.group_size,
            )
            if self.layout.activation_bits == FLOAT_BITS:
                self._packed_weight = packed
            else:
                self._packed_weight = count_with(packed, self._encoder_spec(), self._segments())
            self.release_codes()
        return self._packed_weight

    def pack(self) -> None:
        """Pack the weight now, instead of in the first forward pass."""
        if self.packed_weight() is None:
            super().pack()

    def runs_in_triton(self) -> bool:
        """Whether the layer runs in kernels of Triton, which are operators of torch, once packed."""
        packed = self.view is View.COLLAPSED and self._on_triton()
        return packed or super().runs_in_triton()

    def _on_triton(self) -> bool:
        """Whether the Triton backend runs the layer with the packed weight."""
        if not isinstance(get_backend(self.backend, self.device), TritonBackend):
            return False
        if self.layout.activation_bits == FLOAT_BITS:
            return True
        capacities, layout = self.encoder.capacities, self.layout
        exact = exact_in_float(layout.classes, layout.group_size, capacities)
        return exact and len(capacities) <= _MOST_GROUPS

    def _float_weight(self) -> Tensor:
        """The real weight, kept until `invalidate`."""
        if self._dense_weight is None:
            self._dense_weight = self.dequantized_weight()
        return self._dense_weight

    def invalidate(self) -> None:
        """Forget everything derived from the stored tensors (after they change)."""
        super().invalidate()
        self._levels = self._packed_weight = self._dense_weight = None

    def release_codes(self) -> None:
        """Move the stored codes to host memory, and forget the unpacked ones."""
        super().release_codes()
        self._levels = None

    def __getstate__(self) -> dict[str, Any]:
        """State without what is derived from it."""
        derived = ("_levels", "_packed_weight", "_dense_weight")
        return {**super().__getstate__(), **dict.fromkeys(derived)}

    def extra_repr(self) -> str:
        """Classes of the weight columns, besides what every spiking linear shows."""
        classes = ", ".join(f"T={t} on {n}" for t, n in self.layout.classes)
        return f"{super().extra_repr()}, weight steps: {classes}"

    # -- execution ---------------------------------------------------------------------------------

    def _build_spec(self) -> LinearSpec:
        classes, threshold = self.layout.classes, self.threshold()
        return LinearSpec(
            encoder=self._encoder_spec(),
            levels=self.codes(),
            scale=threshold,
            zero=torch.zeros_like(threshold, dtype=torch.int32),
            bias=self.total_bias(),
            segments=self._segments(),
            weight_bits=int(column_steps(classes).max()).bit_length() + 1,
        )

    def _segments(self) -> tuple[Segment, ...]:
        """Runs of encoded positions with one saliency group and one threshold of the weights."""
        runs = torch.tensor(threshold_runs(self.layout.classes, self.layout.group_size))
        run = torch.repeat_interleave(torch.arange(len(runs)), runs)[self._by_group.cpu()]
        return segments_of(self.group_sizes, run)

    def _forward(self, x: Tensor, offset: Tensor | None) -> Tensor:
        if self.view is not View.COLLAPSED or self.layout.activation_bits == FLOAT_BITS:
            return super()._forward(x, offset)
        self.check_view(self.view)
        weight = self.packed_weight()
        if not isinstance(weight, CountedTernary):
            return super()._forward(x, offset)
        return counted_linear(without_offset(x, offset), weight, self.total_bias(), x.dtype)

    def _forward_float(self, x: Tensor) -> Tensor:
        """Float inputs."""
        if self.view is View.COLLAPSED:
            weight, bias = self.packed_weight(), self.total_bias()
            if isinstance(weight, PackedTernary):
                return packed_linear(x, weight, bias, self.name)
            return nn.functional.linear(x.float(), self._float_weight(), bias).to(x.dtype)
        sums, unit = self._float_sums(x.reshape(-1, self.in_features))
        y = scale_and_sum(sums, unit.unsqueeze(1), self.spec())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def accumulators(self, x: Tensor) -> Tensor:
        """Integer sums of the current view, `[segments, tokens, N]`, the same in every view.

        int32 sums of centred spike counts; of float inputs, int64 sums in units of the fixed-point
        grid of each token.
        """
        if self.layout.activation_bits == FLOAT_BITS:
            return self._float_sums(self.encoder_input(x.reshape(-1, self.in_features)))[0]
        weight = self.packed_weight() if self.view is View.COLLAPSED else None
        if isinstance(weight, CountedTernary):
            return counted_linear(self.encoder_input(x), weight, None, torch.int32)
        return super().accumulators(x)

    def _float_sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Integer sums of float inputs `[M, K]`, and the unit of every token."""
        try:
            integers, unit = fixed_point(rows)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        spec = self.spec()
        ordered = integers.index_select(-1, self.order)
        if self.view is View.BINARY:
            return self._additive_sums(ordered, spec, 1), unit
        # Integers below 2^24 times at most 2^24 spikes: exact in float64.
        trains = (
            spec.levels[None] if self.view is View.COLLAPSED else self._trains(spec.levels)
        ).double()
        sums = [
            sum(ordered[:, s.start : s.stop].double() @ t[:, s.start : s.stop].T for t in trains)
            for s in spec.segments
        ]
        return torch.stack(sums).to(torch.int64), unit

    def _trains(self, levels: Tensor) -> Tensor:
        """Weight spikes of every step, int8 `[T, N, K]`."""
        return weight_spikes(levels, self.layout.classes[-1].steps)

    def _additive_sums(self, activations: Tensor, spec: LinearSpec, scales: int) -> Tensor:
        """Sums without multiplications, int64 `[segments, M, N]`; counted in `additive_work`."""
        work = AdditiveWork() if self.additive_work is None else self.additive_work
        runs = [(s.start, s.stop) for s in spec.segments]
        sums = additive_sums(activations, spec.levels, runs, work)
        work.scalings += scales * sums.numel()
        return sums

    def _run_neurons(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        encoding, accumulators = self._accumulate_steps(rows)
        return accumulators, encoding.threshold

    def _accumulate_steps(self, rows: Tensor) -> tuple[Encoding, Tensor]:
        """Spiking inputs: their events add weight spikes, or a matmul per pair of steps."""
        spec = self.spec()
        spikes, encoding = self.encoder.encode_spikes(rows)
        if self.view is View.BINARY:
            summed = encoding._replace(count=spikes.sum(0).to(encoding.count.dtype))
            centred = self.encoder.centre(summed).to(torch.int64).index_select(-1, self.order)
            return encoding, self._additive_sums(centred, spec, 2).to(torch.int32)
        order, trains = self.order, self._trains(spec.levels)
        raw = torch.stack([self._step_sum(spikes, trains, s, order) for s in spec.segments])
        count = encoding.count.index_select(-1, order).int()
        return encoding, centre(raw, count, encoding.zero_point, spec)

    def _step_sum(self, spikes: Tensor, trains: Tensor, segment: Segment, order: Tensor) -> Tensor:
        """Sum over the steps of inputs and weights on one segment, int32 `[tokens, N]`."""
        columns = slice(segment.start, segment.stop)
        steps = self.layout.steps[segment.act_group]  # later steps are silent in this group
        train = spikes[:steps].index_select(-1, order[columns])
        reach = (self.encoder.levels - 1) * (segment.stop - segment.start)
        shape = (train.shape[1], self.out_features)
        total = torch.zeros(shape, dtype=torch.int32, device=train.device)
        for step in train:
            for weight in trains:
                total += exact_matmul(step, weight[:, columns].T, reach)
        return total
