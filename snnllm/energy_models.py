"""Published energies of single operations, and the work that they are multiplied with.

Sources:
    Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, 45 nm.
    SpikingJelly 2.0, ``op_counter.SimpleEnergyCostConfig`` (the same numbers as presets).
    Coelho et al., Nature Machine Intelligence 2021 (arXiv 2006.10159), QKeras' QTools (bit widths).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from spikingjelly.activation_based.op_counter import SimpleEnergyCostConfig

__all__ = [
    "ENERGY_MODELS",
    "FLOAT_OPERAND_BITS",
    "MEMORY_PJ_PER_BYTE",
    "EnergyModel",
    "MatmulWork",
    "Provenance",
]

FLOAT_OPERAND_BITS = 16
MEMORY_PJ_PER_BYTE: float = SimpleEnergyCostConfig.int8().e_memory_pj_per_byte
"""Cost of reading a byte in SpikingJelly's simple model: 3.12 pJ a bit, cited from STEP."""

_HOROWITZ_INT32_ADD = 0.1  # pJ, 45 nm
_HOROWITZ_INT8_MULTIPLY = 0.2
_HOROWITZ_FP16_MULTIPLY = 1.1
_HOROWITZ_FP32_ADD = 0.9


@dataclass(frozen=True)
class Provenance:
    """Where the costs of a model come from, and what they leave out.

    Attributes:
        name: Short name, used in tables.
        source: Publication or code.
        technology: Process node.
        precision: Operand and accumulator widths.
        scope: What is covered and what is not.
    """

    name: str
    source: str
    technology: str
    precision: str
    scope: str


@dataclass(frozen=True)
class EnergyModel:
    """Energy of single operations, in pJ.

    Attributes:
        provenance: Where the numbers come from.
        multiply: Integer multiplication of two operands of the given bits.
        add: Integer addition into an accumulator of the given bits.
        fp16_mac: Multiplication and addition of fp16 operands.
        fp16_add: Addition of an fp16 operand to the accumulator of `fp16_mac`.
        fp32_mac: Multiplication and addition in fp32.
        fp32_add: Addition in fp32.
    """

    provenance: Provenance
    multiply: Callable[[float, float], float]
    add: Callable[[float], float]
    fp16_mac: float
    fp16_add: float
    fp32_mac: float
    fp32_add: float


@dataclass(frozen=True)
class MatmulWork:
    """The work of one matmul that the spiking network computes with events.

    Attributes:
        macs: Multiply-accumulates of the dense matmul.
        effective_macs: Those of neurons that are not silent.
        synaptic_operations: Additions on the signed re-encoding.
        unary_operations: Additions on the unsigned unary code.
        count_bits: Bits of a spike count, mean over the channels; 16 for a float operand.
        weight_bits: Bits of what an event adds; 16 for float.
        fan_in: Terms of one sum, which widen the accumulator.
    """

    macs: int
    effective_macs: int
    synaptic_operations: int
    unary_operations: int
    count_bits: float
    weight_bits: int
    fan_in: int

    @property
    def encoded(self) -> bool:
        """Whether the operand is spikes; a float operand is multiplied in every network."""
        return self.count_bits < FLOAT_OPERAND_BITS


def _presets() -> EnergyModel:
    int8, fp16, fp32 = (
        SimpleEnergyCostConfig.int8(),
        SimpleEnergyCostConfig.fp16(),
        SimpleEnergyCostConfig.fp32(),
    )
    return EnergyModel(
        Provenance(
            "SpikingJelly presets",
            "SpikingJelly 2.0 SimpleEnergyCostConfig int8/fp16/fp32, after Horowitz, ISSCC 2014",
            "45 nm, 0.9 V",
            f"int8 MAC {int8.e_mac_pj} AC {int8.e_ac_pj}, fp16 MAC {fp16.e_mac_pj} AC "
            f"{fp16.e_ac_pj}, fp32 MAC {fp32.e_mac_pj} AC {fp32.e_ac_pj} pJ; the accumulator is as "
            "wide as the operands, which is too narrow for a real sum and favours additions",
            "arithmetic only: no memory, control, clock or event routing",
        ),
        lambda a, w: int8.e_mac_pj - int8.e_ac_pj,
        lambda bits: int8.e_ac_pj,
        fp16.e_mac_pj,
        fp16.e_ac_pj,
        fp32.e_mac_pj,
        fp32.e_ac_pj,
    )


def _wide_accumulators() -> EnergyModel:
    fp32 = SimpleEnergyCostConfig.fp32()
    return EnergyModel(
        Provenance(
            "Horowitz, 32-bit sums",
            "Horowitz, ISSCC 2014: int8 multiply 0.2, int32 add 0.1, fp16 multiply 1.1, "
            "fp32 multiply 3.7 and add 0.9 pJ",
            "45 nm, 0.9 V",
            "int8 x int8 (narrower operands cost the same) into int32; fp16 x fp16 into fp32",
            "arithmetic only: no memory, control, clock or event routing",
        ),
        lambda a, w: _HOROWITZ_INT8_MULTIPLY,
        lambda bits: _HOROWITZ_INT32_ADD,
        _HOROWITZ_FP16_MULTIPLY + _HOROWITZ_FP32_ADD,
        _HOROWITZ_FP32_ADD,
        fp32.e_mac_pj,
        fp32.e_ac_pj,
    )


def _bit_widths() -> EnergyModel:
    wide = _wide_accumulators()

    def multiply(a: float, w: float) -> float:
        bits = math.sqrt(a * w)
        return 0.002994791667 * bits**2 + 0.001041666667 * bits

    return dataclasses.replace(
        wide,
        provenance=Provenance(
            "QKeras bit widths",
            "QTools of QKeras (Coelho et al. 2021, arXiv 2006.10159): polynomials through "
            "Horowitz's points, add 0.003125 b, multiply 0.002995 b^2 + 0.00104 b pJ, "
            "b = sqrt(b1 b2)",
            "45 nm, 0.9 V, interpolated below 8 bits (4-bit energies were not measured)",
            "operands at their own bit width; accumulators of b1 + b2 + ceil(log2 fan-in) bits; "
            "floats as in the 32-bit model",
            "arithmetic only: no memory, control, clock or event routing",
        ),
        multiply=multiply,
        add=lambda bits: 0.003125 * bits,
    )


ENERGY_MODELS: tuple[EnergyModel, ...] = (_presets(), _wide_accumulators(), _bit_widths())
