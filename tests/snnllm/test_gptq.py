"""GPTQ: better than rounding in the metric it minimises, and numerically safe."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from snnllm.gptq import gptq, inverse_factor
from snnllm.weights import QuantizedWeight, dequantize, round_to_nearest


def problem(rows: int = 24, channels: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator)
    x = torch.randn(4 * channels, channels, generator=generator) @ mix
    return torch.randn(rows, channels, generator=generator), x.T @ x / len(x)


def output_error(
    weight: Tensor, quantized: QuantizedWeight, moment: Tensor, size: int | None
) -> float:
    error = weight - dequantize(quantized, size)
    return float(torch.einsum("nk,kl,nl->", error, moment, error))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_output_error_is_far_below_rounding(bits: int, group_size: int | None) -> None:
    weight, moment = problem()
    quantized = gptq(weight, moment, bits, group_size)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    rounded = round_to_nearest(weight, bits, group_size, moment.diagonal())
    ours = output_error(weight, quantized, moment, group_size)
    assert ours < 0.75 * output_error(weight, rounded, moment, group_size)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = problem()
    identity = torch.eye(weight.shape[1])
    quantized = gptq(weight, identity, 4)
    rounded = round_to_nearest(weight, 4, importance=identity.diagonal())
    assert torch.equal(quantized.codes, rounded.codes)


def test_a_dead_channel_does_no_harm() -> None:
    weight, moment = problem()
    moment[3], moment[:, 3] = 0.0, 0.0
    assert torch.isfinite(dequantize(gptq(weight, moment, 4))).all()


def test_the_factor_inverts_the_damped_hessian() -> None:
    _, moment = problem()
    upper = inverse_factor(moment.clone(), damping=0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(len(moment)), atol=2e-3, rtol=0)


def test_a_failing_factorisation_raises_the_damping_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = torch.randn(4, 6)
    indefinite = torch.eye(6)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    with caplog.at_level(logging.WARNING):
        quantized = gptq(weight, indefinite, 4, name="model.layers.7.mlp.up_proj")
    assert (
        "model.layers.7.mlp.up_proj: Cholesky failed, trying again with damping 0.1" in caplog.text
    )
    assert torch.isfinite(dequantize(quantized)).all()


def test_errors_name_the_layer() -> None:
    weight, moment = problem(4, 8)
    with pytest.raises(ValueError, match="here: the weight holds NaN"):
        gptq(weight * torch.nan, moment, 4, name="here")
    with pytest.raises(
        ValueError, match="here: the Hessian of the calibration inputs is not finite"
    ):
        gptq(weight, moment * torch.inf, 4, name="here")
    hopeless = torch.full((8, 8), -1e6)
    hopeless.fill_diagonal_(1.0)
    with pytest.raises(ValueError, match="here: the Hessian cannot be factorised"):
        gptq(weight, hopeless, 4, name="here")
