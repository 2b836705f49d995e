"""Which matmuls of a model are spiking, with how many steps, in which coding, and how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from neurons import SpikeEncoder
from snnllm.attention import SpikingLlamaAttention
from snnllm.config import FLOAT_BITS
from snnllm.linear import SpikingLinear
from snnllm.ternary_linear import TernaryLinear
from snnllm.vocabulary import QuantizedHead


@dataclass(frozen=True)
class MatmulRow:
    """One matmul of the model.

    Attributes:
        name: Module path, with `.qk` or `.pv` for the attention products.
        spiking: Whether an operand is spikes.
        coding: What the operands are.
        steps: Steps and share of channels of each group, or "-".
        shape: Output x input channels, or heads x head dimension.
        bytes: Stored bytes of the module.
    """

    name: str
    spiking: bool
    coding: str
    steps: str
    shape: str
    bytes: int


def matmuls(model: nn.Module) -> list[MatmulRow]:
    """All matmuls of a LLaMA, in the order of the modules."""
    rows: list[MatmulRow] = []
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear):
            rows.append(_linear_row(name, module))
        elif isinstance(module, nn.Linear | QuantizedHead):
            shape = f"{module.out_features}x{module.in_features}"
            coding = "float" if isinstance(module, nn.Linear) else "float x int8 levels"
            rows.append(MatmulRow(name, False, coding, "-", shape, _bytes(module)))
        elif hasattr(module, "num_key_value_groups"):
            rows.extend(_attention_rows(name, module))
    return rows


def _linear_row(name: str, module: SpikingLinear) -> MatmulRow:
    layout = module.layout
    if isinstance(module, TernaryLinear):
        return _ternary_row(name, module)
    spiking = layout.activation_bits != FLOAT_BITS
    weight = "float" if layout.weight_bits == FLOAT_BITS else f"int{layout.weight_bits} levels"
    coding = f"{_coding(module.encoder)} x {weight}" if spiking else f"float x {weight}"
    steps = _steps(module.encoder) if spiking else "-"
    shape = f"{module.out_features}x{module.in_features}"
    return MatmulRow(name, spiking, coding, steps, shape, _bytes(module))


def _ternary_row(name: str, module: TernaryLinear) -> MatmulRow:
    shares = ", ".join(
        f"T={c.steps} on {100 * c.columns / module.in_features:.3g} %"
        for c in module.layout.classes
    )
    spiking = module.layout.activation_bits != FLOAT_BITS
    coding = f"{_coding(module.encoder) if spiking else 'float'} x ternary spikes"
    steps = f"{_steps(module.encoder)}; W {shares}" if spiking else f"W {shares}"
    shape = f"{module.out_features}x{module.in_features}"
    return MatmulRow(name, True, coding, steps, shape, _bytes(module))


def _attention_rows(name: str, module: nn.Module) -> list[MatmulRow]:
    if not isinstance(module, SpikingLlamaAttention):
        return [MatmulRow(f"{name}.{p}", False, "float", "-", "-", 0) for p in ("qk", "pv")]
    shape = f"{module.k_encoder.channel_group.shape[0]}x{module.head_dim}"
    key, value = module.k_encoder, module.v_encoder
    return [
        MatmulRow(
            f"{name}.qk",
            True,
            f"{_coding(module.q_encoder)} x {_coding(key)}",
            f"Q {_steps(module.q_encoder)}; K {_steps(key)}",
            shape,
            key.channel_group.numel() + module.q_encoder.channel_group.numel(),
        ),
        MatmulRow(
            f"{name}.pv",
            True,
            f"float x {_coding(value)}",
            f"V {_steps(value)}",
            shape,
            value.channel_group.numel(),
        ),
    ]


def _coding(encoder: SpikeEncoder) -> str:
    return f"{encoder.bits}-bit spikes ({encoder.value_range})"


def _steps(encoder: SpikeEncoder) -> str:
    counts = torch.bincount(
        encoder.channel_group.flatten().long().cpu(), minlength=len(encoder.steps)
    ).tolist()
    total = sum(counts)
    return ", ".join(
        f"T={t} on {100 * n / total:.3g} %" for t, n in zip(encoder.steps, counts, strict=True)
    )


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def table(rows: list[MatmulRow]) -> str:
    """The rows as an aligned text table with a line of totals."""
    header = ("matmul", "spiking", "operands", "steps", "shape", "bytes")
    body = [
        (r.name, "yes" if r.spiking else "no", r.coding, r.steps, r.shape, f"{r.bytes:,}")
        for r in rows
    ]
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in (header, *body)
    ]
    spiking = sum(r.spiking for r in rows)
    total = sum(r.bytes for r in rows)
    return "\n".join([*lines, f"{spiking} of {len(rows)} matmuls are spiking; {total:,} bytes"])
