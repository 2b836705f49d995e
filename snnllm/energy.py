"""Energy of counted operations under published per-operation costs, each with its provenance.

Nothing here is measured: an estimate is (number of operations) x (published energy of one). The
models disagree by factors, so all of them are shown side by side, always with the dense rivals, and
there is no single headline number. Arithmetic only; weight traffic is listed apart, because at the
size of a language model it can exceed all of the arithmetic.

Source of the comparison: Yan et al., arXiv 2409.08290v4 (below which spike rate a spiking network
wins, and against the quantised network rather than the float one). Costs: `snnllm.energy_models`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from snnllm.energy_models import (
    ENERGY_MODELS,
    FLOAT_OPERAND_BITS,
    MEMORY_PJ_PER_BYTE,
    EnergyModel,
    MatmulWork,
    Provenance,
)

__all__ = [
    "ENERGY_MODELS",
    "EnergyModel",
    "EnergyReport",
    "EnergyRow",
    "MatmulWork",
    "MemoryRow",
    "Network",
    "Provenance",
    "estimate_energy",
    "matmul_energy",
    "memory_row",
    "si",
]

PUBLISHED_THRESHOLD = 0.057
"""Spikes per neuron and binary step above which arXiv 2409.08290v4 finds the QNN cheaper, T = 5."""


class Network(StrEnum):
    """Executions whose arithmetic is compared; they compute the same matmuls.

    The collapsed ones multiply spike counts by weight levels; `COLLAPSED_SPARSE` skips silent
    neurons. The dense ones are the network before conversion in another precision. `SPIKING_FP32`
    against `DENSE_FP32` is the comparison usual in papers on spiking networks, and flatters them.
    """

    SPIKING = "spiking, signed events"
    SPIKING_UNARY = "spiking, unary events"
    COLLAPSED = "collapsed integers"
    COLLAPSED_SPARSE = "collapsed integers, zeros skipped"
    DENSE_INT8 = "dense int8"
    DENSE_FP16 = "dense fp16"
    SPIKING_FP32 = "spiking, fp32 additions"
    DENSE_FP32 = "dense fp32"


_SPIKING = (Network.SPIKING, Network.SPIKING_UNARY, Network.SPIKING_FP32)
_FP32 = (Network.SPIKING_FP32, Network.DENSE_FP32)
_FLOAT_DENSE = (Network.DENSE_FP16, Network.DENSE_FP32)


def matmul_energy(model: EnergyModel, network: Network, work: MatmulWork) -> float:
    """Energy of one matmul in one execution.

    spiking: ``SynOps * add``;  collapsed and dense: ``MACs * (multiply + add)``; a float operand
    (P of P V, a float weight) makes the addition or the multiply-accumulate a float one.

    Args:
        model: Costs.
        network: Execution.
        work: Operations.

    Returns:
        Energy in pJ.
    """
    events = work.unary_operations if network is Network.SPIKING_UNARY else work.synaptic_operations
    if network in _FP32:
        counted = network is Network.SPIKING_FP32 and work.encoded
        return events * model.fp32_add if counted else work.macs * model.fp32_mac
    growth = math.ceil(math.log2(max(2, work.fan_in)))
    if network is Network.DENSE_INT8:
        return work.macs * (model.multiply(8, 8) + model.add(16 + growth))
    if network is Network.DENSE_FP16 or not work.encoded:
        return work.macs * model.fp16_mac
    integer = work.weight_bits < FLOAT_OPERAND_BITS
    add = model.add(work.count_bits + work.weight_bits + growth) if integer else model.fp16_add
    if network in _SPIKING:
        return events * add
    multiply = model.multiply(work.count_bits, work.weight_bits)
    macs = work.effective_macs if network is Network.COLLAPSED_SPARSE else work.macs
    return macs * (multiply + add if integer else model.fp16_mac)


@dataclass(frozen=True)
class EnergyRow:
    """Energy of one execution under one model.

    Attributes:
        model: Name of the energy model.
        network: Execution.
        matmul_pj: Converted matmuls, pJ.
        rest_pj: What stays float (head, norms, softmax, encoders, scales), pJ.
        matmul_versus_spiking: Converted matmuls over those of the spiking execution.
        versus_spiking: Total over that of the spiking execution; below 1 this execution wins.
        break_even_rate: Spike rate below which the spiking execution would win, all rates scaled
            alike; None for the spiking executions, 0 where it cannot win.
    """

    model: str
    network: Network
    matmul_pj: float
    rest_pj: float
    matmul_versus_spiking: float
    versus_spiking: float
    break_even_rate: float | None

    @property
    def total_pj(self) -> float:
        """Converted matmuls and the rest, pJ."""
        return self.matmul_pj + self.rest_pj


@dataclass(frozen=True)
class MemoryRow:
    """Weights read once: for a whole prompt together, or for every token when decoding.

    Attributes:
        storage: How the weights are stored.
        bytes: Bytes read.
        energy_pj: Energy, pJ.
    """

    storage: str
    bytes: int
    energy_pj: float


def memory_row(storage: str, size: int) -> MemoryRow:
    """Traffic of `size` bytes at SpikingJelly's cost (3.12 pJ a bit, cited from STEP)."""
    return MemoryRow(storage, size, size * MEMORY_PJ_PER_BYTE)


@dataclass(frozen=True)
class EnergyReport:
    """All executions under all models; no headline.

    Attributes:
        rows: One per model and execution.
        memory: Weight traffic, apart from the arithmetic.
        provenance: Of every model.
        spike_rate: Measured events over event slots, for the break-even rates.
    """

    rows: tuple[EnergyRow, ...]
    memory: tuple[MemoryRow, ...]
    provenance: tuple[Provenance, ...]
    spike_rate: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        values = dataclasses.asdict(self)
        for value, row in zip(values["rows"], self.rows, strict=True):
            value["total_pj"] = row.total_pj
        return {
            **values,
            "published_threshold": {
                "spike_rate": PUBLISHED_THRESHOLD,
                "source": "arXiv 2409.08290v4, binary T = 5, memory included",
            },
        }

    def to_markdown(self) -> str:
        """A table per model with its provenance, then the weight traffic."""
        lines = ["### Energy estimates", ""]
        for provenance in self.provenance:
            lines += _model_markdown(
                provenance, [r for r in self.rows if r.model == provenance.name]
            )
        lines += [
            f"Measured spike rate {100 * self.spike_rate:.2f} %. Break-even: the rate below which "
            "the spiking execution would need less than that row, if all rates changed alike. For "
            "comparison, with memory included a rate-coded network of T = 5 binary steps must stay "
            f"below {100 * PUBLISHED_THRESHOLD:.1f} % to beat its quantised twin (arXiv "
            "2409.08290v4); one step of a 4-bit neuron is 15 binary steps. The fp32 rows are "
            "compared with each other.",
            "",
            "| weights read once (per prompt, or per decoded token) | bytes | energy |",
            "|---|--:|--:|",
            *(
                f"| {m.storage} | {si(m.bytes)}B | {si(m.energy_pj * 1e-12)}J |"
                for m in self.memory
            ),
            "",
            f"Weight traffic: {MEMORY_PJ_PER_BYTE} pJ/byte (SpikingJelly 2.0 "
            "SimpleEnergyCostConfig, 3.12 pJ/bit as cited from STEP); no cache model, no "
            "activations, KV cache or membranes.",
        ]
        return "\n".join(lines)


def _model_markdown(provenance: Provenance, rows: Sequence[EnergyRow]) -> list[str]:
    p = provenance
    lines = [
        f"**{p.name}.** Source: {p.source}. Technology: {p.technology}. Precision: {p.precision}. "
        f"Scope: {p.scope}.",
        "",
        "| execution | matmuls | / spiking | float rest | total | / spiking | break-even rate |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        matmul, rest, total = (
            si(e * 1e-12) + "J" for e in (row.matmul_pj, row.rest_pj, row.total_pj)
        )
        lines.append(
            f"| {row.network} | {matmul} | {row.matmul_versus_spiking:.3f} | {rest} | {total} "
            f"| {row.versus_spiking:.3f} | {_rate_text(row.break_even_rate)} |"
        )
    cheaper = [r for r in rows if r.versus_spiking < 1 and r.network not in _FP32]
    wins = ", ".join(f"{r.network} ({1 / max(r.versus_spiking, 1e-9):.2f}x)" for r in cheaper)
    return [*lines, "", f"Cheaper than spiking with signed events: {wins or 'none'}.", ""]


def _rate_text(rate: float | None) -> str:
    if rate is None:
        return ""
    return "none" if rate <= 0 else "always" if rate >= 1 else f"{100 * rate:.2f} %"


def si(value: float) -> str:
    """Format with four significant digits and an SI prefix: ``12345 -> '12.35 k'``."""
    if value == 0:
        return "0 "
    exponent = min(4, max(-4, math.floor(math.log10(abs(value)) / 3)))
    prefix = {-4: "p", -3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}[exponent]
    return f"{value / 1000.0**exponent:.4g} {prefix}"


def estimate_energy(
    work: Sequence[MatmulWork],
    float_operations: int,
    overhead_operations: int,
    spike_rate: float,
    memory: Sequence[MemoryRow] = (),
    models: Sequence[EnergyModel] = ENERGY_MODELS,
) -> EnergyReport:
    """Energy of every execution under every model.

    Args:
        work: The converted matmuls.
        float_operations: Multiply-accumulates that stay float in every execution (head, norms,
            softmax); charged as fp16, or as fp32 in the fp32 executions.
        overhead_operations: Those of encoders and output scales, which the float networks lack.
        spike_rate: Events over event slots of the signed re-encoding.
        memory: Weight traffic to list.
        models: Energy models.

    Returns:
        The report.
    """
    rows: list[EnergyRow] = []
    for model in models:
        rows += _model_rows(model, work, float_operations, overhead_operations, spike_rate)
    return EnergyReport(tuple(rows), tuple(memory), tuple(m.provenance for m in models), spike_rate)


def _model_rows(
    model: EnergyModel,
    work: Sequence[MatmulWork],
    float_operations: int,
    overhead: int,
    spike_rate: float,
) -> list[EnergyRow]:
    matmul = {n: sum(matmul_energy(model, n, w) for w in work) for n in Network}
    rest = {
        n: (model.fp32_mac if n in _FP32 else model.fp16_mac)
        * (float_operations + (0 if n in _FLOAT_DENSE else overhead))
        for n in Network
    }
    rows = []
    for n in Network:
        spiking = Network.SPIKING_FP32 if n in _FP32 else Network.SPIKING
        events = sum(matmul_energy(model, spiking, w) for w in work if w.encoded)
        own_matmul, own = matmul[spiking], matmul[spiking] + rest[spiking]
        total = matmul[n] + rest[n]
        # Only the energy of the events shrinks with the rate; the rest of the total is fixed.
        slack = (total - (own - events)) / events if events else 0.0
        rate = None if n in _SPIKING else max(0.0, spike_rate * slack)
        matmul_ratio, ratio = (
            a / b if b else 1.0 for a, b in ((matmul[n], own_matmul), (total, own))
        )
        name = model.provenance.name
        rows.append(EnergyRow(name, n, matmul[n], rest[n], matmul_ratio, ratio, rate))
    return rows
