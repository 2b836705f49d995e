"""Trainable operands: a linear over spikes with learnable clipping, and an encoder of Q, K or V.

    w' = (W * column) * row                                     equivalent transformation (LET)
    hi = sigmoid(u) max(w', 0),   lo = sigmoid(l) min(w', 0)     learnable clipping (LWC), per output
    w_hat = s (clip(round(w'/s) + z, 0, 2^b - 1) - z)           channel or group of inputs
    y = x_hat(x - m) w_hat^T + m w'^T + bias

Rounding is straight-through (`neurons.straight_through`). What is frozen afterwards comes from the
same functions, so the spiking block computes what was trained. Commensurate thresholds are trained as
split ones: the spiking block rounds them up, by a few percent on average.

Source: OmniQuant (arXiv 2308.13137) around SpikeLLM (arXiv 2407.04752).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neurons import SpikeEncoder
from neurons.straight_through import levels_parameters, levels_through, spikes_through
from snnllm.config import FLOAT_BITS
from snnllm.hadamard import OnlineRotation
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.weights import QuantizedWeight, expand_groups, run_sizes, weight_parameters

INITIAL_LOGIT = 4.0
"""Initial clipping, `sigmoid(4) = 0.982` (method.md section 5)."""
_LARGEST_LOGIT = 7.0
_SCALE_FLOOR = 1e-8


class Operand(nn.Module):
    """An encoder of activations whose clip factors can be learned.

    Args:
        encoder: Its groups, capacities, range (commensurate as split) and clip factors are taken over.
        learn: Whether the clip factors are learned, from `INITIAL_LOGIT` on.
    """

    group: Tensor
    capacity: Tensor

    def __init__(self, encoder: SpikeEncoder, learn: bool) -> None:
        super().__init__()
        device = encoder.clip.device
        self.shared = encoder.value_range == "shared"
        self.register_buffer("group", encoder.channel_group.clone())
        self.register_buffer("capacity", torch.tensor(encoder.capacities, device=device).float())
        self.register_buffer("limit", encoder.clip.clone())
        self.logit: nn.Parameter | None = None
        if learn:
            self.logit = nn.Parameter(torch.full_like(encoder.clip, INITIAL_LOGIT))

    def clip(self) -> Tensor:
        """Factors on the range of each group, `[G]` in (0, 1]."""
        limit = self.get_buffer("limit")
        if self.logit is None:
            return limit
        factors = limit * torch.sigmoid(self.logit)
        return factors.mean().expand_as(factors) if self.shared else factors

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode `x`, float32, straight-through."""
        return spikes_through(x, self.group, self.capacity, self.shared, self.clip())


class Unit(nn.Module):
    """Linears that read the same spikes: their weights above each other, one encoder.

    Args:
        paths: The linears in their block.
        weight: float32 `[N, K]`, original channel order.
        bias: `[N]` or None.
        module: An empty spiking linear with the encoder of all; None leaves them dense.
        importance: Mean square of each input channel `[K]` for the initial clipping, or None.
        learn_weight: Whether the weight is learned.
        learn_clip: Whether the ranges of weights and activations are learned.
        offset: Offset of the encoder's input `[K]`, learned; or None.
    """

    weight: Tensor

    def __init__(
        self,
        paths: Sequence[str],
        weight: Tensor,
        bias: Tensor | None,
        module: SpikingLinear | None,
        importance: Tensor | None,
        learn_weight: bool,
        learn_clip: bool,
        offset: Tensor | None,
    ) -> None:
        super().__init__()
        self.paths, self.low = tuple(paths), None
        if learn_weight:
            self.weight = nn.Parameter(weight.clone())
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.layout: LinearLayout | None = None if module is None else module.layout
        self.rotation: OnlineRotation | None = None if module is None else module.rotation
        self.operand: Operand | None = None
        self.offset: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        if module is None:
            return
        if module.rotation is not None:
            self.register_buffer("matrix", module.rotation.matrix())
        self.sizes = run_sizes(module.in_features, module.weight_groups)
        self._run_size = module.layout.group_size
        segments = module.layout.segment_scales
        group = module.encoder.channel_group
        self.register_buffer("order", module.order)
        self.register_buffer("segment", group.clone() if segments else torch.zeros_like(group))
        if module.layout.activation_bits != FLOAT_BITS:
            self.operand = Operand(module.encoder, learn_clip)
        if offset is not None:
            self.offset = nn.Parameter(offset.clone())
            self.shift = nn.Parameter(weight.new_zeros(len(weight)))
        if self.rounds:
            self._start_clipping(weight, importance)

    low: torch.dtype | None
    """Type of the matmul, if not float32."""

    @property
    def rounds(self) -> bool:
        """Whether the weights become integer levels."""
        return self.layout is not None and self.layout.weight_bits != FLOAT_BITS

    @property
    def top(self) -> int:
        """The largest weight code."""
        assert self.layout is not None
        return int(2**self.layout.weight_bits - 1)

    @torch.no_grad()
    def _start_clipping(self, weight: Tensor, importance: Tensor | None) -> None:
        """Logits of the clipping: `INITIAL_LOGIT`, or from the clip ratio of least output error."""
        runs = 1 if self._run_size is not None else len(self.sizes)
        self.register_buffer("capacity", weight.new_full((runs,), float(self.top)))
        start = weight.new_full((len(weight), len(self.sizes)), INITIAL_LOGIT)
        if importance is not None:
            assert self.layout is not None
            order = self.get_buffer("order")
            scale, _ = weight_parameters(
                weight[:, order], self.layout.weight_bits, self.sizes, importance[order]
            )
            full, _ = weight_parameters(weight[:, order], self.layout.weight_bits, self.sizes)
            start = torch.logit(scale / full).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        self.upper, self.lower = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def effective(self, column: Tensor | None, row: Tensor | None) -> Tensor:
        """The float weight after the equivalent transformation, `[N, K]`.

        Args:
            column: Factors of the input channels `[K]`, or None.
            row: Factors of the output channels `[N]`, or None.
        """
        weight = self.weight
        if column is not None:
            weight = weight * column
        if row is not None:
            weight = weight * row.unsqueeze(1)
        return weight if self.rotation is None else weight @ self.get_buffer("matrix")

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight as `levels_through` takes it: `[N, K]`, or runs of inputs `[N, J, size]`."""
        size = self._run_size
        if size is None:
            return weight
        rows: Tensor = _Permuted.apply(weight, self.get_buffer("order"))
        missing = -weight.shape[1] % size  # zeros do not change a range, which includes zero
        return nn.functional.pad(rows, (0, missing)).view(len(weight), -1, size)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Clipping of the lower and the upper end, `[N, J]`, or `[N, J, 1]` for runs."""
        low, high = torch.sigmoid(self.lower), torch.sigmoid(self.upper)
        if self._run_size is None:
            return low, high
        return low.unsqueeze(-1), high.unsqueeze(-1)

    def rounded(self, weight: Tensor) -> Tensor:
        """Weight levels with a straight-through gradient, `[N, K]`, original channel order."""
        group, capacity = self.get_buffer("segment"), self.get_buffer("capacity")
        rows = self._rows(weight)
        out = levels_through(rows, *self._factors(), group, capacity, floor=_SCALE_FLOOR)
        if self._run_size is None:
            return out
        flat = out.flatten(1)[:, : weight.shape[1]]
        back: Tensor = _Permuted.apply(flat, torch.argsort(self.get_buffer("order")))
        return back

    @torch.no_grad()
    def codes(self, weight: Tensor) -> QuantizedWeight:
        """The integer levels of `rounded`, columns in encoded order."""
        group, capacity = self.get_buffer("segment"), self.get_buffer("capacity")
        order = self.get_buffer("order")
        scale, zero = levels_parameters(
            self._rows(weight), *self._factors(), group, capacity, floor=_SCALE_FLOOR
        )
        scale, zero = scale.flatten(1), zero.flatten(1)
        channels = weight.shape[1]
        s, z = (expand_groups(v, channels, self.sizes) for v in (scale, zero))
        codes = torch.floor(weight[:, order] / s + (z + 0.5)).clamp_(0, self.top)
        return QuantizedWeight(codes.to(torch.uint8), scale, zero.to(torch.uint8))

    def total_bias(self, weight: Tensor, row: Tensor | None) -> Tensor | None:
        """Bias and image of the offset, `[N]`, or None."""
        bias: Tensor | None = self._buffers.get("bias")
        if bias is not None and row is not None:
            bias = bias * row
        if self.offset is None or self.shift is None:
            return bias
        image = weight @ self.offset + self.shift
        return image if bias is None else bias + image

    def forward(self, x: Tensor, column: Tensor | None, row: Tensor | None) -> Tensor:
        """Apply the linears to `x [..., K]`, already divided by `column`; `[..., N]`."""
        weight = self.effective(column, row)
        bias = self.total_bias(weight, row)
        if self.rounds:
            weight = self.rounded(weight)
        if self.rotation is not None:
            x = self.rotation(x)
        if self.offset is not None:
            x = x - self.offset
        if self.operand is not None:
            x = self.operand(x)
        if self.low is None:
            return nn.functional.linear(x, weight, bias)
        y = nn.functional.linear(x.to(self.low), weight.to(self.low)).float()
        return y if bias is None else y + bias


class _Permuted(torch.autograd.Function):
    """Columns in another order; the gradient takes them back by selection, not by atomic adds."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(1, torch.argsort(order)), None
