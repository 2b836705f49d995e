"""Ternary weights: the spikes of neurons, thresholds, steps for a budget, GPTQ, storage."""

from __future__ import annotations

import itertools
import logging
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neurons import SignedGIFNode
from snnllm.column_sweep import LAZY_COLUMNS, column_sweep
from snnllm.gptq import gptq, inverse_factor
from snnllm.kernels.triton.gptq import triton_available
from snnllm.packing import digit_word, digits_width, pack_digits, unpack_digits
from snnllm.step_allocation import (
    DISTORTION,
    StepClass,
    allocate_salient,
    allocate_steps,
    classes_of,
    column_steps,
    threshold_runs,
)
from snnllm.step_budget import SCORED_STEPS
from snnllm.ternary import (
    TernaryCoder,
    column_score,
    dequantize_ternary,
    find_thresholds,
    refine,
    ternary_gptq,
    weight_spikes,
)
from snnllm.weights import dequantize


def problem(rows: int = 24, channels: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator)
    x = torch.randn(4 * channels, channels, generator=generator) @ mix
    x[:, ::20] *= 5.0
    return torch.randn(rows, channels, generator=generator), x.T @ x / len(x)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    error = weight - rounded
    return float(((error @ moment) * error).sum() / ((weight @ moment) * weight).sum())


@given(
    st.lists(st.floats(-12.0, 12.0, width=32), min_size=1, max_size=16),
    st.floats(2.0**-6, 4.0, width=16),
    st.integers(1, 9),
)
def test_a_weight_is_the_train_of_a_signed_neuron(
    weights: list[float], threshold: float, steps: int
) -> None:
    weight, alpha = torch.tensor(weights), torch.tensor([threshold])
    coder = TernaryCoder(torch.ones(len(weights)), [steps] * len(weights))
    coder.begin(weight.unsqueeze(1), 0)
    coder.thresholds[-1] = alpha
    values = torch.cat([coder.round(k, w.unsqueeze(0)) for k, w in enumerate(weight)])
    levels = torch.cat(coder.levels).squeeze(1)
    assert torch.equal(values, levels * alpha)
    node = SignedGIFNode(levels=2, step_mode="s", backend="torch")
    charge = weight / alpha
    fired = [node(charge if t == 0 else torch.zeros_like(charge)) for t in range(steps)]
    assert torch.equal(torch.stack(fired), weight_spikes(levels.to(torch.int8), steps).float())
    assert torch.equal(torch.stack(fired).sum(0), levels)


def test_a_train_must_hold_the_level() -> None:
    with pytest.raises(ValueError, match=r"must lie in -2\.\.2"):
        weight_spikes(torch.tensor([3]), 2)


def test_the_threshold_is_the_best_of_a_fine_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 6, generator=generator)
    h = torch.rand(128, generator=generator) + 0.1
    for steps in (1, 2, 5):
        found = find_thresholds(weight, h, steps).float()

        def loss(alpha: Tensor, steps: int = steps) -> Tensor:
            count = torch.clamp(torch.round(weight / alpha), -steps, steps)
            return (h.unsqueeze(1) * (weight - alpha * count).square()).sum(0)

        largest = weight.abs().amax(0) / steps
        grid = torch.stack([loss(largest * r) for r in torch.linspace(0.05, 1.0, 400)])
        assert (loss(found) <= 1.02 * grid.amin(0)).all()


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_a_row_without_weight_stays_silent(value: float) -> None:
    threshold = find_thresholds(torch.full((8, 2), value), torch.ones(8), 1)
    assert (threshold > 0).all()
    weight, moment = problem(4, 40)
    weight[1] = 0.0
    trains = ternary_gptq(weight, moment, torch.ones(40, dtype=torch.int64))
    assert not trains.levels[1].any()
    assert torch.isfinite(dequantize_ternary(trains)).all()


def test_the_score_is_that_of_optimal_brain_surgeon() -> None:
    weight, moment = problem(8, 40)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(40)
    expected = weight.square().sum(0) / torch.linalg.inv(damped.double()).diagonal().float()
    torch.testing.assert_close(column_score(weight, moment), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("mean", [1.0, 1.2, 1.4, 2.0, 3.3, 7.0])
def test_a_budget_is_met_and_spent_in_the_order_of_the_scores(mean: float) -> None:
    score = torch.rand(50, generator=torch.Generator().manual_seed(0))
    steps = allocate_steps(score, mean)
    assert int(steps.sum()) == round(mean * 50)
    ranked = steps[score.argsort(descending=True)]
    assert torch.equal(ranked, ranked.sort(descending=True).values)


def test_no_other_allocation_is_better() -> None:
    score = torch.tensor([9.0, 3.0, 1.0, 0.2])

    def loss(steps: tuple[int, ...]) -> float:
        return sum(s * DISTORTION[t] for s, t in zip(score.tolist(), steps, strict=True))

    every = [s for s in itertools.product(range(1, 8), repeat=4) if sum(s) == 10]
    assert tuple(allocate_steps(score, 2.5).tolist()) == min(every, key=loss)


def test_salient_columns_get_the_steps() -> None:
    score = torch.tensor([1.0, 5.0, 2.0, 0.5, 0.1, 3.0, 0.0, 0.0, 0.0, 0.0])
    assert allocate_salient(score, 1.4, 5).tolist() == [1, 5, 1, 1, 1, 1, 1, 1, 1, 1]
    assert allocate_salient(score, 1.2, 2).tolist() == [1, 2, 1, 1, 1, 2, 1, 1, 1, 1]


def test_budgets_and_maps_out_of_range_are_refused() -> None:
    score = torch.ones(4)
    assert len(DISTORTION) == SCORED_STEPS + 1  # of 0..7 steps
    for mean in (0.9, 7.5, float("nan")):
        with pytest.raises(ValueError, match=r"mean_steps must be in 1\.\.7"):
            allocate_steps(score, mean)
    with pytest.raises(ValueError, match="finite and not negative"):
        allocate_steps(score * -1, 1.4)
    with pytest.raises(ValueError, match="cannot average 3"):
        allocate_salient(score, 3.0, 2)
    with pytest.raises(ValueError, match=r"weight steps must be in 1\.\.127"):
        classes_of(torch.tensor([1, 128]))
    with pytest.raises(ValueError, match="must be integers"):
        classes_of(torch.tensor([1.0]))


def test_classes_and_runs() -> None:
    classes = classes_of(torch.tensor([1, 5, 1, 2, 1]))
    assert classes == (StepClass(1, 3), StepClass(2, 1), StepClass(5, 1))
    assert threshold_runs(classes, 2) == (2, 1, 1, 1)
    assert threshold_runs(classes, None) == (3, 1, 1)
    assert column_steps(classes).tolist() == [1, 1, 1, 2, 5]


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("size", [128, 24, None])
def test_the_compensated_error_is_far_below_rounding(size: int | None, refinements: int) -> None:
    weight, moment = problem()
    steps = allocate_steps(column_score(weight, moment), 1.4)
    trains = ternary_gptq(weight, moment, steps, size, refinements=refinements)
    assert trains.classes == classes_of(steps)
    limit = column_steps(trains.classes)
    assert (trains.levels.abs() <= limit).all()
    assert torch.equal(steps[trains.order], limit)
    ours = output_error(weight, dequantize_ternary(trains, size), moment)
    uncorrelated = ternary_gptq(weight, torch.diag(moment.diagonal()), steps, size)
    assert ours < 0.6 * output_error(weight, dequantize_ternary(uncorrelated, size), moment)


def test_saliency_and_refinement_lower_the_error() -> None:
    weight, moment = problem()
    score = column_score(weight, moment)
    generator = torch.Generator().manual_seed(0)

    def error(steps: Tensor, refinements: int = 0) -> float:
        trains = ternary_gptq(weight, moment, steps, refinements=refinements)
        return output_error(weight, dequantize_ternary(trains), moment)

    salient = error(allocate_steps(score, 1.4))
    assert salient < 0.8 * error(allocate_steps(torch.rand(160, generator=generator), 1.4))
    assert salient < 0.7 * error(torch.ones(160, dtype=torch.int64))
    assert error(allocate_steps(score, 1.4), 2) < 0.97 * salient


def test_a_refinement_never_raises_the_loss() -> None:
    weight, moment = problem(6, 40)
    steps = torch.tensor([1] * 30 + [3] * 10)
    runs = (16, 14, 10)
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-1, 2, (6, 40), generator=generator).float()
    threshold = torch.rand(6, 3, generator=generator) + 0.5
    sizes = torch.tensor(runs)
    losses = []
    for _ in range(6):
        error = weight - levels * threshold.repeat_interleave(sizes, 1)
        losses.append(float(((error @ moment) * error).sum()))
        levels, threshold = refine(weight, moment, levels, threshold, steps, runs)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_five_levels_beat_two_bits_at_nearly_the_same_size() -> None:
    weight, moment = problem()
    trains = ternary_gptq(weight, moment, torch.full((160,), 2), refinements=2)
    two = dequantize(gptq(weight, moment, 2, 128), 128)
    assert output_error(weight, dequantize_ternary(trains), moment) < output_error(
        weight, two, moment
    )


def test_the_sweep_does_not_depend_on_its_lazy_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(5, 90)
    upper = inverse_factor(moment.double().float().clone())

    def swept(lazy: int) -> Tensor:
        monkeypatch.setattr("snnllm.column_sweep.CPU_LAZY_COLUMNS", lazy)
        coder = TernaryCoder(moment.diagonal(), [2] * 90)
        return column_sweep(weight, upper, coder, (64, 26))

    torch.testing.assert_close(swept(1), swept(1000), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="do not sum to 90 columns"):
        column_sweep(weight, upper, TernaryCoder(moment.diagonal(), [2] * 90), (64,))


def test_a_failing_factorisation_raises_the_damping_and_names_the_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    indefinite = torch.eye(6)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    with caplog.at_level(logging.WARNING):
        trains = ternary_gptq(
            torch.randn(4, 6), indefinite, torch.ones(6, dtype=torch.int64), name="here.up_proj"
        )
    assert "here.up_proj: Cholesky failed, trying again" in caplog.text
    assert torch.isfinite(dequantize_ternary(trains)).all()


def test_errors_name_the_layer() -> None:
    weight, moment = problem(4, 8)
    one = torch.ones(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="here: the weight holds NaN"):
        ternary_gptq(weight * torch.nan, moment, one, name="here")
    with pytest.raises(ValueError, match="here: the Hessian of the calibration inputs is not"):
        ternary_gptq(weight, moment * torch.inf, one, name="here")
    with pytest.raises(ValueError, match="here: weights beyond 65504"):
        ternary_gptq(weight * 1e6, moment, one, name="here")


@given(st.integers(2, 255), st.integers(0, 70), st.integers(0, 3))
def test_digits_survive_packing(base: int, columns: int, rows: int) -> None:
    values = torch.randint(0, base, (rows, columns))
    values[:, :1] = base - 1
    packed = pack_digits(values, base)
    assert packed.shape == (rows, digits_width(columns, base))
    assert torch.equal(unpack_digits(packed, columns, base).long(), values)


def test_five_trits_take_a_byte() -> None:
    assert digit_word(3) == (1, 5)
    assert digits_width(640, 3) * 8 / 640 == 1.6
    assert digits_width(26, 5) == 8  # 13 digits in 4 bytes, 2.46 bits each
    with pytest.raises(ValueError, match="take 2 bytes a row, got 3"):
        unpack_digits(torch.zeros(1, 3, dtype=torch.uint8), 6, 3)


@pytest.mark.skipif(
    not triton_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton's interpreter (GPUs: test_on_a_gpu_the_trains_are_as_good)",
)
@pytest.mark.parametrize("channels", [40, 133])
def test_the_kernels_round_as_torch_does(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(18, channels)
    steps = torch.tensor([1, 3])[torch.arange(channels) % 2]
    monkeypatch.setattr("snnllm.column_sweep.CPU_LAZY_COLUMNS", 64)
    monkeypatch.setattr("snnllm.ternary.CPU_LAZY_COLUMNS", LAZY_COLUMNS)
    expected = ternary_gptq(weight, moment, steps, 48, refinements=1)
    monkeypatch.setattr("snnllm.ternary.fused", lambda tensor: True)
    found = ternary_gptq(weight, moment, steps, 48, refinements=1)
    same = (found.levels == expected.levels).float().mean()
    assert same > 0.99  # one rounding tie may go the other way, and the columns behind follow
    errors = [output_error(weight, dequantize_ternary(t, 48), moment) for t in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.gpu
def test_on_a_gpu_the_trains_are_as_good() -> None:
    weight, moment = problem(200, 300)
    steps = allocate_steps(column_score(weight, moment), 1.4)
    here = ternary_gptq(weight, moment, steps, refinements=2)
    there = ternary_gptq(weight.cuda(), moment.cuda(), steps.cuda(), refinements=2)
    errors = [output_error(weight, dequantize_ternary(t).cpu(), moment) for t in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
