"""Operations of single modules: a row of the operation report from an input or from encodings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurons import Encoding, SpikeEncoder
from snnllm.attention import SpikingLlamaAttention
from snnllm.config import FLOAT_BITS
from snnllm.linear import SpikingLinear
from snnllm.operation_report import FP16_ACE, Kind, OperationRow, SpikeStatistics
from snnllm.step_allocation import column_steps
from snnllm.ternary_linear import TernaryLinear

__all__ = ["AttentionCall", "float_attention_rows", "linear_row", "spike_statistics"]


def spike_statistics(encoder: SpikeEncoder, count: Tensor, centred: Tensor) -> SpikeStatistics:
    """Spikes of an encoded operand.

    Args:
        encoder: What encoded it.
        count: q, `[tokens, *]`, the last axes being those of the channel groups.
        centred: q - z, likewise.
    """
    group = encoder.channel_group.long()
    capacities = torch.tensor(encoder.capacities, device=group.device)[group]
    magnitude = centred.abs()
    return SpikeStatistics(
        neurons=count[0].numel() if len(count) else 0,
        tokens=count.shape[0],
        slots=int(capacities.expand(count.shape).sum()),
        events=int(magnitude.sum(dtype=torch.int64)),
        unary_events=int(count.sum(dtype=torch.int64)),
        silent=int((magnitude == 0).sum()),
    )


def _steps(encoder: SpikeEncoder) -> int:
    """Sum of the time steps of all channels that the encoder describes."""
    group = encoder.channel_group.long()
    return int(torch.tensor(encoder.steps, device=group.device)[group].sum())


def _paired_steps(encoder: SpikeEncoder, other: SpikeEncoder | None) -> int:
    """Sum over channels of the steps of both operands of a product; Q has the groups of K, or one."""
    if other is None or len(other.steps) == 1:
        return _steps(encoder)
    group = encoder.channel_group.long()
    pairs = [a * b for a, b in zip(encoder.steps, other.steps, strict=True)]
    return int(torch.tensor(pairs, device=group.device)[group].sum())


def _count_bits(encoder: SpikeEncoder) -> float:
    """Bits of a spike count, mean over the channels."""
    bits = torch.tensor([float(c.bit_length()) for c in encoder.capacities])
    return float(bits[encoder.channel_group.long().cpu()].mean())


def _scales(module: SpikingLinear) -> int:
    """Multiplications per token: a division per neuron, two scales and a zero point a sum.

    With commensurate thresholds a sum has an integer multiple, too; merged ones have two scales together.
    """
    encoded = module.layout.activation_bits != FLOAT_BITS
    integer = encoded and module.layout.weight_bits != FLOAT_BITS
    of_outputs = 0
    if integer:
        spec = module.spec()
        sums = len(spec.segments)
        multiples = sums if spec.encoder.commensurate and len(spec.encoder.sizes) > 1 else 0
        of_outputs = 2 * (1 if spec.merged else sums) + sums + multiples
    return (module.in_features if encoded else 0) + module.out_features * of_outputs


def _weight_bytes(module: SpikingLinear) -> int:
    buffers = [b for key, b in module.named_buffers(recurse=False) if key.startswith("weight")]
    return sum(b.numel() * b.element_size() for b in buffers)


def linear_row(name: str, module: SpikingLinear, x: Tensor) -> OperationRow:
    """Operations of one spiking linear.

    Args:
        name: Name of the row.
        module: The linear.
        x: Its input, `[tokens, K]`.
    """
    if isinstance(module, TernaryLinear):
        return _ternary_row(name, module, x)
    layout, outputs = module.layout, module.out_features
    macs = x.shape[0] * module.in_features * outputs
    encoded = layout.activation_bits != FLOAT_BITS
    spikes, steps = None, module.in_features
    if encoded:
        encoding = module.encoder.encode(module.encoder_input(x))
        spikes = spike_statistics(module.encoder, encoding.count, module.encoder.centre(encoding))
        steps = _steps(module.encoder)
    return OperationRow(
        name=name,
        kind=Kind.LINEAR,
        steps=module.encoder.steps if encoded else (1,),
        activation_bits=layout.activation_bits,
        weight_bits=layout.weight_bits,
        count_bits=_count_bits(module.encoder) if encoded else FLOAT_BITS,
        fan_in=module.in_features,
        spikes=spikes,
        query=None,
        synaptic_operations=spikes.events * outputs if spikes else 0,
        unary_operations=spikes.unary_events * outputs if spikes else 0,
        effective_macs=macs - (spikes.silent * outputs if spikes else 0),
        macs=macs,
        ace=x.shape[0] * outputs * steps * layout.activation_bits * layout.weight_bits,
        weights=module.in_features * outputs,
        weight_bytes=_weight_bytes(module),
        scale_operations=x.shape[0] * _scales(module),
    )


def _ternary_row(name: str, module: TernaryLinear, x: Tensor) -> OperationRow:
    """Operations of a linear whose weight is ternary spikes; a weight spike adds an activation.

    With float inputs the spikes are those of the weight and the other operand is float. With spiking
    inputs a weight spike adds `q - z` in one addition; the unary code of both would add q times.
    """
    layout, outputs, tokens = module.layout, module.out_features, len(x)
    levels = module.levels().long().abs()
    at = module.weight_order.long()
    weight_steps = column_steps(layout.classes).to(at.device)
    weight_bits = 2  # of a ternary spike
    encoded = layout.activation_bits != FLOAT_BITS
    spikes = None
    if encoded:
        encoding = module.encoder.encode(module.encoder_input(x))
        centred = module.encoder.centre(encoding)
        spikes = spike_statistics(module.encoder, encoding.count, centred)
        heard, events = (centred != 0)[:, at].sum(0), encoding.count[:, at].sum(0)
        group = module.encoder.channel_group.long()[at]
        steps = torch.tensor(module.encoder.steps, device=at.device)[group]
        effort = int((steps * weight_steps).sum()) * layout.activation_bits * weight_bits
        scales = module.in_features + 2 * outputs * len(module.spec().segments)
    else:
        heard = events = (x != 0)[:, at].sum(0)
        effort = int(weight_steps.sum()) * FLOAT_BITS * weight_bits
        scales = outputs * len(module.spec().segments)
    level_bits = torch.log2(2.0 * weight_steps + 1).ceil()
    per_channel = levels.sum(0)
    return OperationRow(
        name=name,
        kind=Kind.LINEAR,
        steps=module.encoder.steps if encoded else tuple(c.steps for c in layout.classes),
        activation_bits=layout.activation_bits if encoded else weight_bits,
        weight_bits=weight_bits if encoded else FLOAT_BITS,
        count_bits=_count_bits(module.encoder) if encoded else float(level_bits.mean()),
        fan_in=module.in_features,
        spikes=spikes,
        query=None,
        synaptic_operations=int((heard * per_channel).sum()),
        unary_operations=int((events * per_channel).sum()),
        effective_macs=int((heard * (levels > 0).sum(0)).sum()),
        macs=tokens * module.in_features * outputs,
        ace=tokens * outputs * effort,
        weights=module.in_features * outputs,
        weight_bytes=_weight_bytes(module),
        scale_operations=tokens * scales,
    )


@dataclass(frozen=True)
class AttentionCall:
    """One observed call of a spiking attention module.

    Attributes:
        name: Module path.
        query: Encoded Q, counts `[B, H, S, D]`.
        key: Encoded K, counts `[B, H_kv, S, D]`.
        value: Encoded V, likewise.
        visible: Which query sees which key, bool `[B, S, S]`, without padding.
        keep: True for tokens, False for padding, `[B, S]`.
    """

    name: str
    query: Encoding
    key: Encoding
    value: Encoding
    visible: Tensor
    keep: Tensor

    def rows(self, module: SpikingLlamaAttention) -> list[OperationRow]:
        """Q K^T, whose Q is integers, and P V, whose P is float."""
        q, k, v = module.q_encoder, module.k_encoder, module.v_encoder
        query = self._statistics(q, self.query)
        scores = self.pairs * self.query.count.shape[1]
        # Per score and group: two scales in Q K^T; in P V the threshold of V, which depends on the
        # key and so has to be multiplied into P. Q divides here, K and V in `_row`.
        qk_scales = query.neurons * query.tokens + 2 * scores * len(k.steps)
        pv_scales = scores * len(v.steps)
        dim, length = self.query.count.shape[-1], self.visible.shape[-1]
        return [
            self._row(Kind.QK, k, self.key, q, dim, query, qk_scales),
            self._row(Kind.PV, v, self.value, None, length, None, pv_scales),
        ]

    @property
    def pairs(self) -> int:
        """Visible pairs of a query token and a key token."""
        return int(self.visible.sum())

    @property
    def groups(self) -> int:
        """Query heads that share a KV head."""
        return self.query.count.shape[1] // self.key.count.shape[1]

    def _statistics(self, encoder: SpikeEncoder, encoding: Encoding) -> SpikeStatistics:
        count = encoding.count.transpose(1, 2)[self.keep]  # [B, H, S, D] -> [tokens, H, D]
        return spike_statistics(encoder, count, encoder.centre(encoding).transpose(1, 2)[self.keep])

    def _heard(self, amount: Tensor) -> int:
        """Sum an amount of keys `[B, H_kv, S, D]` over all queries that see them."""
        audience = self.visible.sum(1)[:, None]  # [B, 1, S]
        per_key = amount.sum(-1, dtype=torch.int64)
        return int((per_key * audience).sum()) * self.groups

    def _row(
        self,
        kind: Kind,
        encoder: SpikeEncoder,
        encoding: Encoding,
        other: SpikeEncoder | None,
        fan_in: int,
        query: SpikeStatistics | None,
        scale_operations: int,
    ) -> OperationRow:
        centred, spikes = encoder.centre(encoding), self._statistics(encoder, encoding)
        pairs = self.pairs * self.groups
        other_bits = FLOAT_BITS if other is None else other.bits
        return OperationRow(
            name=f"{self.name}.{kind}",
            kind=kind,
            steps=encoder.steps,
            activation_bits=encoder.bits,
            weight_bits=other_bits,
            count_bits=_count_bits(encoder),
            fan_in=fan_in,
            spikes=spikes,
            query=query,
            synaptic_operations=self._heard(centred.abs()),
            unary_operations=self._heard(encoding.count),
            effective_macs=self._heard(centred != 0),
            macs=pairs * encoder.channel_group.numel(),
            ace=pairs * _paired_steps(encoder, other) * encoder.bits * other_bits,
            scale_operations=scale_operations + spikes.neurons * spikes.tokens,
        )


def float_attention_rows(
    name: str, visible: Tensor, heads: int, head_dim: int
) -> list[OperationRow]:
    """Rows of an attention whose operands stay float: MACs only.

    Args:
        name: Module path.
        visible: Which query sees which key, bool `[B, S, S]`.
        heads: Query heads.
        head_dim: Channels of a head.
    """
    macs = int(visible.sum()) * heads * head_dim
    return [
        OperationRow(
            name=f"{name}.{kind}",
            kind=kind,
            steps=(1,),
            activation_bits=FLOAT_BITS,
            weight_bits=FLOAT_BITS,
            count_bits=FLOAT_BITS,
            fan_in=fan_in,
            spikes=None,
            query=None,
            synaptic_operations=0,
            unary_operations=0,
            effective_macs=macs,
            macs=macs,
            ace=macs * FP16_ACE,
        )
        for kind, fan_in in ((Kind.QK, head_dim), (Kind.PV, visible.shape[-1]))
    ]
