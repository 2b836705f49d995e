"""PB-LLM, BiLLM and plain GPTQ: what they round to, and what they say it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snnllm.baselines import bi_llm, pb_llm, plain_gptq
from snnllm.gptq import gptq
from snnllm.weights import dequantize


def problem(rows: int = 16, channels: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator)
    x = torch.randn(4 * channels, channels, generator=generator) @ mix
    x[:, ::16] *= 6.0
    weight = torch.randn(rows, channels, generator=generator)
    return weight, x.T @ x / len(x)


def error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    e = weight - rounded
    return float(((e @ moment) * e).sum() / ((weight @ moment) * weight).sum())


def test_pb_llm_has_two_values_and_salient_ones() -> None:
    weight, moment = problem()
    rounded = pb_llm(weight, moment, 0.9)
    for row in rounded.weight:
        values, counts = row.unique(return_counts=True)
        binary = counts.topk(2).values
        assert 150 < int(binary.sum()) <= 256  # the rest are of 8 bits
        assert len(values) > 3
    assert rounded.additive == 0.9
    assert rounded.steps == pytest.approx(0.9 + 8 * 0.1)
    assert rounded.bits == pytest.approx(1 + 0.9 + 0.8 + 4 * 16 / 256)


def test_pb_llm_with_one_kind_of_weight() -> None:
    weight, moment = problem()
    binary = pb_llm(weight, moment, 1.0)
    assert all(len(row.unique()) == 2 for row in binary.weight)
    eight = pb_llm(weight, moment, 0.0)
    assert error(weight, eight.weight, moment) < 1e-4
    errors = [error(weight, pb_llm(weight, moment, low).weight, moment) for low in (1, 0.95, 0.8)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match=r"low must be a fraction in \[0, 1\], got 1.5"):
        pb_llm(weight, moment, 1.5)


def test_billm_has_four_values_a_kind_of_column() -> None:
    weight, moment = problem()
    rounded = bi_llm(weight, moment)
    for block in rounded.weight.split(128, 1):
        for row in block:
            assert len(row.unique()) <= 8  # four of salient columns, two signs and two magnitudes
    assert rounded.additive == 1.0
    assert 1.0 < rounded.steps < 1.5
    assert rounded.bits == pytest.approx(2 + 5 * 16 / 128 + 1 / 16)
    assert error(weight, rounded.weight, moment) < 0.7 * error(
        weight, pb_llm(weight, moment, 1.0).weight, moment
    )


def test_billm_without_salience_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem()
    whole = error(weight, bi_llm(weight, moment).weight, moment)
    monkeypatch.setattr("snnllm.baselines._MOST_SALIENT", 1)
    assert whole < error(weight, bi_llm(weight, moment).weight, moment)


@pytest.mark.parametrize("bits", [2, 3])
def test_plain_gptq_counts_its_scales(bits: int) -> None:
    weight, moment = problem()
    rounded = plain_gptq(weight, moment, bits)
    exact = dequantize(gptq(weight, moment, bits, 128), 128)
    torch.testing.assert_close(rounded.weight, exact, rtol=2e-3, atol=1e-4)
    assert rounded.bits == bits + (16 + bits) / 128
    assert rounded.additive == 0.0


def test_a_hopeless_hessian_names_the_layer() -> None:
    weight, moment = problem(4, 8)
    for quantise in (lambda h: pb_llm(weight, h, 0.9, "here"), lambda h: bi_llm(weight, h, "here")):
        with pytest.raises(ValueError, match="here: the Hessian of the calibration inputs is not"):
            quantise(moment * torch.inf)
