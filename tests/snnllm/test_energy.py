"""Energy models: published constants, hand-computed matmuls, break-even rates."""

from __future__ import annotations

import dataclasses
import json

import pytest
from spikingjelly.activation_based.op_counter import SimpleEnergyCostConfig

from snnllm.energy import (
    ENERGY_MODELS,
    EnergyModel,
    EnergyRow,
    MatmulWork,
    Network,
    estimate_energy,
    matmul_energy,
    memory_row,
    si,
)

PRESETS, WIDE, BITS = ENERGY_MODELS
# 1000 MACs of 4-bit counts with 4-bit weights, 64 terms a sum, 2.5 events per MAC, 0.2 silent.
WORK = MatmulWork(1000, 800, 2500, 7000, 4.0, 4, 64)
PRODUCT = dataclasses.replace(WORK, weight_bits=16)  # P V: events add floats
FLOAT = MatmulWork(1000, 1000, 0, 0, 16.0, 4, 64)  # a float activation


def row_of(model: EnergyModel, network: Network, **changes: int) -> EnergyRow:
    work = [dataclasses.replace(WORK, **changes), dataclasses.replace(FLOAT, macs=20)]
    report = estimate_energy(work, 300, 50, 0.17, models=[model])
    return next(row for row in report.rows if row.network is network)


def test_presets_are_those_of_spikingjelly() -> None:
    assert PRESETS.multiply(8, 8) + PRESETS.add(8) == SimpleEnergyCostConfig.int8().e_mac_pj
    assert PRESETS.add(8) == SimpleEnergyCostConfig.int8().e_ac_pj
    assert PRESETS.fp16_mac == SimpleEnergyCostConfig.fp16().e_mac_pj
    assert (PRESETS.fp32_mac, PRESETS.fp32_add) == (4.6, 0.9)


def test_bit_width_model_passes_through_the_points_of_horowitz() -> None:
    assert BITS.multiply(8, 8) == pytest.approx(0.2, rel=1e-6)
    assert BITS.multiply(32, 32) == pytest.approx(3.1, rel=1e-6)
    assert BITS.add(32) == pytest.approx(0.1)
    assert WIDE.fp16_mac == pytest.approx(1.1 + 0.9)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Network.SPIKING, 2500 * 0.1),
        (Network.SPIKING_UNARY, 7000 * 0.1),
        (Network.COLLAPSED, 1000 * 0.3),
        (Network.COLLAPSED_SPARSE, 800 * 0.3),
        (Network.DENSE_INT8, 1000 * 0.3),
        (Network.DENSE_FP16, 1000 * 2.0),
        (Network.SPIKING_FP32, 2500 * 0.9),
        (Network.DENSE_FP32, 1000 * 4.6),
    ],
)
def test_energy_of_an_integer_matmul(network: Network, expected: float) -> None:
    assert matmul_energy(WIDE, network, WORK) == pytest.approx(expected)


def test_accumulators_grow_with_the_operands_and_the_fan_in() -> None:
    add = 0.003125 * (4 + 4 + 6)
    assert matmul_energy(BITS, Network.SPIKING, WORK) == pytest.approx(2500 * add)
    multiply = 0.002994791667 * 16 + 0.001041666667 * 4
    assert matmul_energy(BITS, Network.COLLAPSED, WORK) == pytest.approx(1000 * (multiply + add))


def test_a_float_operand_costs_float_operations() -> None:
    assert matmul_energy(WIDE, Network.SPIKING, PRODUCT) == pytest.approx(2500 * 0.9)
    assert matmul_energy(WIDE, Network.COLLAPSED_SPARSE, PRODUCT) == pytest.approx(800 * 2.0)
    for network in (Network.SPIKING, Network.COLLAPSED, Network.DENSE_FP16):
        assert matmul_energy(WIDE, network, FLOAT) == pytest.approx(1000 * 2.0)
    assert matmul_energy(WIDE, Network.SPIKING_FP32, FLOAT) == pytest.approx(1000 * 4.6)


@pytest.mark.parametrize("model", ENERGY_MODELS, ids=lambda m: m.provenance.name)
@pytest.mark.parametrize("rival", [Network.COLLAPSED, Network.DENSE_INT8, Network.DENSE_FP16])
def test_at_the_break_even_rate_both_need_the_same(model: EnergyModel, rival: Network) -> None:
    rate = row_of(model, rival).break_even_rate
    assert rate is not None
    events = round(WORK.synaptic_operations * rate / 0.17)
    spiking = row_of(model, Network.SPIKING, synaptic_operations=events)
    assert spiking.total_pj == pytest.approx(row_of(model, rival).total_pj, rel=1e-3)


def test_ratios_compare_totals_and_say_who_wins() -> None:
    report = estimate_energy([WORK], 0, 0, 0.17, models=[BITS])
    ratios = {row.network: row.versus_spiking for row in report.rows}
    assert ratios[Network.SPIKING] == 1
    assert ratios[Network.COLLAPSED] < 1 < ratios[Network.DENSE_FP16]
    assert "Cheaper than spiking with signed events: collapsed integers (" in report.to_markdown()


def test_overhead_is_charged_to_the_encoded_networks_only() -> None:
    report = estimate_energy([WORK], 10, 5, 0.17, models=[WIDE])
    rest = {row.network: row.rest_pj for row in report.rows}
    assert rest[Network.SPIKING] == pytest.approx(15 * WIDE.fp16_mac)
    assert rest[Network.DENSE_FP16] == pytest.approx(10 * WIDE.fp16_mac)


def test_without_events_there_is_no_break_even() -> None:
    report = estimate_energy([FLOAT], 10, 5, 0.0)
    rates = {row.break_even_rate for row in report.rows}
    assert rates == {None, 0.0}
    assert "none" in report.to_markdown()


def test_report_names_every_source_and_shows_every_execution() -> None:
    report = estimate_energy([WORK, FLOAT], 300, 50, 0.17, [memory_row("packed", 100)])
    assert len(report.rows) == len(ENERGY_MODELS) * len(Network)
    text = report.to_markdown()
    for model in ENERGY_MODELS:
        assert model.provenance.source in text
        assert "45 nm" in model.provenance.technology
        assert "no memory" in model.provenance.scope
    for network in Network:
        assert text.count(f"| {network} |") == len(ENERGY_MODELS)
    assert "2409.08290" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert values["memory"][0]["energy_pj"] == pytest.approx(2496)
    assert values["rows"][0]["total_pj"] == report.rows[0].total_pj


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (12345, "12.35 k"), (0.5, "500 m"), (3.2e-6, "3.2 u"), (7, "7 "), (2e15, "2000 T")],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text
