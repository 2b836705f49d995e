"""The operation report: what one run of a spiking model counted, per module and in total.

Definitions (the columns of the tables):

    events     e = sum |q - z| over neurons and tokens        signed re-encoding (method.md, 3)
    rate       e / sum of the capacities T_c (L - 1)          events per binary event slot
    unary      sum q                                          unsigned code, about z events too many
    SynOps     linear  e x out_features                       one addition of a weight level each
               ternary weights: one addition of an activation per weight spike that meets one
               Q K^T   sum over visible (i, j) of sum_c |k_jc - z_j|: a K event adds the integer
                       (q_ic - z_i) to the score of every query that sees its token
               P V     sum over visible (i, j) of sum_c |v_jc - z_j|: a V event adds the float P_ij
    MACs       the dense matmul; attention counts visible (query, key) pairs of the actual mask
    ACE        sum over MACs of T_c x (bits of the spike) x (bits of the other operand)

A causal prefill and decoding the same tokens one by one with a cache need the same operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from snnllm.energy import (
    ENERGY_MODELS,
    EnergyModel,
    EnergyReport,
    MatmulWork,
    Network,
    estimate_energy,
    matmul_energy,
    memory_row,
    si,
)

__all__ = ["FloatPart", "Kind", "OperationReport", "OperationRow", "SpikeStatistics"]

FP16_ACE = 256
"""Arithmetic computation effort of an fp16 x fp16 multiply-accumulate: 16 x 16."""


class Kind(StrEnum):
    """What a matmul multiplies."""

    LINEAR = "linear"
    QK = "qk"
    PV = "pv"


@dataclass(frozen=True)
class SpikeStatistics:
    """Spikes of one operand, over all counted tokens.

    Attributes:
        neurons: Neurons per token.
        tokens: Tokens.
        slots: Binary event slots, the sum of all capacities over neurons and tokens.
        events: Events of the signed re-encoding, sum of |q - z|.
        unary_events: Events of the unsigned unary code, sum of q.
        silent: Neuron and token pairs with q = z, which emit nothing.
    """

    neurons: int
    tokens: int
    slots: int
    events: int
    unary_events: int
    silent: int

    @property
    def rate(self) -> float:
        """Events per event slot, in 0..1."""
        return self.events / max(1, self.slots)

    @property
    def unary_rate(self) -> float:
        """Events of the unary code per event slot, in 0..1."""
        return self.unary_events / max(1, self.slots)

    @property
    def spikes_per_neuron(self) -> float:
        """Mean events of a neuron in one token."""
        return self.events / max(1, self.neurons * self.tokens)

    @property
    def silent_fraction(self) -> float:
        """Fraction of neuron and token pairs without an event."""
        return self.silent / max(1, self.neurons * self.tokens)


@dataclass(frozen=True)
class OperationRow:
    """One matmul of the model.

    Attributes:
        name: Module path; `.qk` and `.pv` are the products of an attention module.
        kind: linear, qk or pv.
        steps: Time steps of the channel groups of the encoded operand.
        activation_bits: Bits of one spike, 16 for a float operand.
        weight_bits: Bits of the other operand: weight level, spike of Q; 16 for a float (P).
        count_bits: Bits of a spike count, mean over the channels; 16 for a float operand.
        fan_in: Terms of one sum.
        spikes: Statistics of the encoded operand (input, K, V); None for a float operand.
        query: Statistics of Q, in qk rows.
        synaptic_operations: Additions on the signed re-encoding.
        unary_operations: Additions on the unsigned unary code.
        effective_macs: MACs of neurons that are not silent.
        macs: MACs of the dense matmul.
        ace: Arithmetic computation effort of the spiking matmul.
        weights: Number of weights, 0 in attention.
        weight_bytes: Bytes of the stored weight with its scales.
        scale_operations: Multiplications of encoders, scales, zero points and multiples of commensurate thresholds.
    """

    name: str
    kind: Kind
    steps: tuple[int, ...]
    activation_bits: int
    weight_bits: int
    count_bits: float
    fan_in: int
    spikes: SpikeStatistics | None
    query: SpikeStatistics | None
    synaptic_operations: int
    unary_operations: int
    effective_macs: int
    macs: int
    ace: int
    weights: int = 0
    weight_bytes: int = 0
    scale_operations: int = 0

    @property
    def ace_ratio(self) -> float:
        """ACE over that of the fp16 matmul."""
        return self.ace / max(1, FP16_ACE * self.macs)

    @property
    def role(self) -> str:
        """Name without the block, for sums over blocks: `q_proj`, `qk`."""
        return self.name.rpartition(".")[2]

    @property
    def work(self) -> MatmulWork:
        """What the energy models need."""
        return MatmulWork(
            macs=self.macs,
            effective_macs=self.effective_macs,
            synaptic_operations=self.synaptic_operations,
            unary_operations=self.unary_operations,
            count_bits=self.count_bits,
            weight_bits=self.weight_bits,
            fan_in=self.fan_in,
        )

    def energy_pj(self, model: EnergyModel, network: Network = Network.SPIKING) -> float:
        """Energy of this matmul alone, in pJ."""
        return matmul_energy(model, network, self.work)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form with the derived figures."""
        values = dataclasses.asdict(self)
        values["kind"], values["ace_ratio"] = str(self.kind), self.ace_ratio
        values["spiking_pj"] = {m.provenance.name: self.energy_pj(m) for m in ENERGY_MODELS}
        for key in ("spikes", "query"):
            statistics: SpikeStatistics | None = getattr(self, key)
            if statistics is not None:
                for name in ("rate", "unary_rate", "spikes_per_neuron", "silent_fraction"):
                    values[key][name] = getattr(statistics, name)
        return values


@dataclass(frozen=True)
class FloatPart:
    """What stays dense in every execution.

    Attributes:
        name: Module or operation.
        macs: Multiply-accumulates, or multiplications of an elementwise operation.
        rule: How they were counted.
    """

    name: str
    macs: int
    rule: str


@dataclass(frozen=True)
class OperationReport:
    """Operations of one run.

    Attributes:
        label: The spiking configuration, such as `W4A4T2`.
        sequences: Sequences that ran.
        tokens: Tokens without padding.
        rows: Converted matmuls, in the order of execution.
        float_parts: What stays float.
        parameter_bytes: Parameters and buffers as stored in memory, tied tensors once.
    """

    label: str
    sequences: int
    tokens: int
    rows: tuple[OperationRow, ...]
    float_parts: tuple[FloatPart, ...]
    parameter_bytes: int

    def total(self, field: str, rows: Iterable[OperationRow] | None = None) -> int:
        """Sum of an integer field of `OperationRow` over `rows` (all by default)."""
        return sum(int(getattr(row, field)) for row in (self.rows if rows is None else rows))

    @cached_property
    def spikes(self) -> SpikeStatistics:
        """Statistics of all encoded operands together; neurons are summed over the modules."""
        parts = [s for row in self.rows for s in (row.spikes, row.query) if s is not None]
        return SpikeStatistics(
            neurons=sum(s.neurons for s in parts),
            tokens=self.tokens,
            slots=sum(s.slots for s in parts),
            events=sum(s.events for s in parts),
            unary_events=sum(s.unary_events for s in parts),
            silent=sum(s.silent for s in parts),
        )

    def ace_ratio(self, kind: Kind | None = None) -> float:
        """ACE of the converted matmuls (of one kind, or all) over that of fp16."""
        rows = [row for row in self.rows if kind is None or row.kind is kind]
        return self.total("ace", rows) / max(1, FP16_ACE * self.total("macs", rows))

    @cached_property
    def energy(self) -> EnergyReport:
        """Energy estimates of all executions under all models."""
        weights, stored = self.total("weights"), self.total("weight_bytes")
        memory = (
            memory_row("converted linears, packed", stored),
            memory_row("converted linears, dense int8", weights),
            memory_row("converted linears, dense fp16", 2 * weights),
            memory_row("everything else (embedding, head, norms)", self.parameter_bytes - stored),
        )
        return estimate_energy(
            [row.work for row in self.rows],
            sum(part.macs for part in self.float_parts),
            self.total("scale_operations"),
            self.spikes.rate,
            memory,
        )

    def neurobench(self) -> dict[str, Any]:
        """Figures under NeuroBench's metric names, operations per sequence.

        Effective ACs are the SynOps on the signed re-encoding; effective MACs what stays float;
        sparsity is that of the binary signed event trains.
        """
        rows = [row for row in self.rows if not row.work.encoded]
        float_macs = sum(part.macs for part in self.float_parts) + self.total("macs", rows)
        dense = self.total("macs") + sum(part.macs for part in self.float_parts)
        return {
            "SynapticOperations": {
                "Effective_MACs": float_macs / self.sequences,
                "Effective_ACs": self.total("synaptic_operations") / self.sequences,
                "Dense": dense / self.sequences,
            },
            "ActivationSparsity": 1.0 - self.spikes.rate,
            "Footprint": self.parameter_bytes,
        }

    def totals(self) -> dict[str, Any]:
        """Sums over the model."""
        fields = ("synaptic_operations", "unary_operations", "effective_macs", "macs", "ace")
        return {
            **{field: self.total(field) for field in fields},
            "float_macs": sum(part.macs for part in self.float_parts),
            "scale_operations": self.total("scale_operations"),
            "ace_ratio": self.ace_ratio(),
            "ace_ratio_linears": self.ace_ratio(Kind.LINEAR),
            "spike_rate": self.spikes.rate,
            "unary_spike_rate": self.spikes.unary_rate,
            "spikes_per_neuron": self.spikes.spikes_per_neuron,
            "silent_fraction": self.spikes.silent_fraction,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; integers are exact."""
        return {
            "label": self.label,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "coding": "unary count, signed re-encoding sign(q - z) x |q - z|",
            "definitions": __doc__,
            "totals": self.totals(),
            "neurobench": self.neurobench(),
            "rows": [row.to_dict() for row in self.rows],
            "float_parts": [dataclasses.asdict(part) for part in self.float_parts],
            "energy": self.energy.to_dict(),
        }

    def totals_markdown(self) -> str:
        """The table of the sums over the model."""
        synops, unary = self.total("synaptic_operations"), self.total("unary_operations")
        macs, spikes = self.total("macs"), self.spikes
        lines = [
            f"### Operations of {self.label}, {self.tokens} tokens, {self.sequences} sequence(s)",
            "",
            "| total of the converted matmuls | |",
            "|---|--:|",
            f"| spike rate (signed events per slot) | {100 * spikes.rate:.2f} % |",
            f"| spike rate of the unsigned unary code | {100 * spikes.unary_rate:.2f} % |",
            f"| spikes per neuron and token | {spikes.spikes_per_neuron:.3f} |",
            f"| silent neurons | {100 * spikes.silent_fraction:.2f} % |",
            f"| synaptic operations (additions) | {synops:,} |",
            f"| the same in the unsigned unary code | {unary:,} |",
            f"| MACs of the dense matmuls | {macs:,} |",
            f"| MACs of neurons that are not silent | {self.total('effective_macs'):,} |",
            f"| additions per dense MAC | {synops / max(1, macs):.3f} |",
            f"| ACE over fp16, linears | {100 * self.ace_ratio(Kind.LINEAR):.3f} % |",
            f"| ACE over fp16, attention included (P is float) | {100 * self.ace_ratio():.3f} % |",
        ]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Totals, sums by projection, what stays float, energy with provenance, every module."""
        scales = FloatPart(
            "encoders and scales", self.total("scale_operations"), "not in the float networks"
        )
        parts = ["| what stays float | MACs | counted as |", "|---|--:|---|"]
        parts += [f"| {p.name} | {p.macs:,} | {p.rule} |" for p in (*self.float_parts, scales)]
        definitions = ["```", *(__doc__ or "").strip().splitlines()[4:], "```"]
        sections = [
            [self.totals_markdown()],
            ["### By projection, summed over the blocks", "", *_table(_by_role(self.rows))],
            ["### Dense parts", "", *parts],
            [self.energy.to_markdown()],
            ["### Every module", "", *_table([(row.name, [row]) for row in self.rows])],
            ["### Definitions", "", *definitions],
        ]
        return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _by_role(rows: Sequence[OperationRow]) -> list[tuple[str, list[OperationRow]]]:
    roles: dict[str, list[OperationRow]] = {}
    for row in rows:
        roles.setdefault(row.role, []).append(row)
    return list(roles.items())


def _table(groups: Sequence[tuple[str, list[OperationRow]]]) -> list[str]:
    energies = [f"spiking, {model.provenance.name}" for model in ENERGY_MODELS]
    header = (
        *("module", "T", "neurons", "rate", "unary rate", "spikes/neuron", "silent"),
        *("SynOps", "MACs", "SynOps/MAC", "ACE", *energies),
    )
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'--:|' * (len(header) - 2)}"]
    for name, rows in groups:
        steps = "/".join(map(str, rows[0].steps))
        cells = [name, steps, *_spike_cells([row.spikes for row in rows])]
        synops = sum(row.synaptic_operations for row in rows)
        macs = sum(row.macs for row in rows)
        ace = sum(row.ace for row in rows) / max(1, FP16_ACE * macs)
        cells += [si(synops), si(macs), f"{synops / max(1, macs):.3f}", f"{100 * ace:.3f} %"]
        cells += [f"{si(1e-12 * sum(r.energy_pj(m) for r in rows))}J" for m in ENERGY_MODELS]
        lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
    return lines


def _spike_cells(statistics: Sequence[SpikeStatistics | None]) -> list[str]:
    known = [s for s in statistics if s is not None]
    if not known:
        return ["float", "", "", "", ""]

    def total(value: Callable[[SpikeStatistics], int]) -> int:
        return sum(value(s) for s in known)

    slots, pairs = total(lambda s: s.slots), total(lambda s: s.neurons * s.tokens)
    return [
        str(known[0].neurons),
        f"{100 * total(lambda s: s.events) / max(1, slots):.2f} %",
        f"{100 * total(lambda s: s.unary_events) / max(1, slots):.2f} %",
        f"{total(lambda s: s.events) / max(1, pairs):.3f}",
        f"{100 * total(lambda s: s.silent) / max(1, pairs):.2f} %",
    ]
