"""Round-to-nearest weights: ranges, groups, the clip search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnllm.weights import (
    QuantizedWeight,
    dequantize,
    expand_groups,
    round_to_nearest,
    run_sizes,
    weight_parameters,
)


def random_weight(seed: int, rows: int = 6, channels: int = 20) -> torch.Tensor:
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs() + 0.5  # a row of one sign: the range must still include zero
    weight[1] = 0.0
    return weight


@settings(max_examples=50, derandomize=True)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 8, 16, 64]),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_level(bits, group_size, seed):
    weight = random_weight(seed)
    quantized = round_to_nearest(weight, bits, group_size)
    codes, scale, zero = quantized
    groups = len(run_sizes(20, group_size))
    assert codes.dtype == zero.dtype == torch.uint8
    assert scale.dtype == torch.float32
    assert scale.shape == zero.shape == (6, groups)
    assert int(codes.max()) < 2**bits
    assert int(zero.max()) < 2**bits
    error = (dequantize(quantized, group_size) - weight).abs()
    # Half a level of rounding and, at an end of the range, half a level of the rounded zero point.
    assert (error <= expand_groups(scale, 20, group_size) * 1.001).all()
    inside = (codes > 0) & (codes < 2**bits - 1)
    half = expand_groups(scale, 20, group_size).expand(6, 20) * 0.501
    assert (error <= half)[inside].all()


def test_the_parameters_are_the_equations():
    weight = torch.tensor([[-1.0, 2.0, 0.5], [1.0, 2.0, 3.0]])
    scale, zero = weight_parameters(weight, 4)
    assert scale.tolist() == [[pytest.approx(3 / 15)], [pytest.approx(3 / 15)]]
    assert zero.tolist() == [[5], [0]]


def test_zero_weights_stay_zero():
    weight = random_weight(3)
    weight[2, ::2] = 0.0
    restored = dequantize(round_to_nearest(weight, 4, 8), 8)
    assert (restored[weight == 0] == 0).all()


def test_a_group_sees_its_own_channels_only():
    weight = random_weight(4, 4, 32)
    whole = round_to_nearest(weight, 4, 16)
    for j, part in enumerate(weight.split(16, dim=1)):
        alone = round_to_nearest(part, 4)
        assert torch.equal(whole.scale[:, j : j + 1], alone.scale)
        assert torch.equal(whole.codes[:, 16 * j : 16 * j + 16], alone.codes)


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_clip_search_lowers_the_weighted_error(group_size):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 30, generator=generator)
    weight[:, 3] *= 6  # an outlier on a channel that hardly matters
    importance = torch.ones(30)
    importance[3] = 1e-4
    plain = dequantize(round_to_nearest(weight, 3, group_size), group_size)
    clipped = dequantize(round_to_nearest(weight, 3, group_size, importance), group_size)

    def error(restored):
        return ((restored - weight).square() * importance).sum(1)

    assert (error(clipped) <= error(plain) * 1.0001).all()
    assert error(clipped).sum() < 0.8 * error(plain).sum()


def test_group_helpers():
    assert run_sizes(20, None) == (20,)
    assert run_sizes(20, 8) == (8, 8, 4)
    assert run_sizes(20, (15, 0, 5)) == (15, 0, 5)
    with pytest.raises(ValueError, match="do not sum to 20"):
        run_sizes(20, (8, 8))
    values = torch.tensor([[1.0, 2.0, 3.0]])
    assert expand_groups(values, 20, 8)[0].tolist() == [1.0] * 8 + [2.0] * 8 + [3.0] * 4
    assert expand_groups(values[:, :1], 20, None).shape == (1, 20)
    assert expand_groups(values, 3, (1, 0, 2)).tolist() == [[1.0, 3.0, 3.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad):
    weight = random_weight(0)
    weight[4, 7] = bad
    with pytest.raises(ValueError, match="The weight holds NaN or infinite values"):
        round_to_nearest(weight, 4)


def test_the_input_is_not_changed():
    weight = random_weight(1)
    before = weight.clone()
    round_to_nearest(weight, 4, 8, torch.ones(20))
    assert torch.equal(weight, before)


def test_dequantize_is_the_equation():
    quantized = QuantizedWeight(
        torch.tensor([[0, 7, 15]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        torch.tensor([[7]], dtype=torch.uint8),
    )
    assert dequantize(quantized).tolist() == [[-3.5, 0.0, 4.0]]


@pytest.mark.parametrize(
    ("channels", "groups"), [(6, None), (6, 2), (7, 2), (7, (3, 0, 4)), (6, (3, 3))]
)
def test_values_of_groups_are_repeated(channels, groups):
    sizes = torch.tensor(run_sizes(channels, groups))
    values = torch.arange(2.0 * len(sizes)).view(2, -1)
    expected = values.repeat_interleave(sizes, dim=1)
    assert torch.equal(expand_groups(values, channels, groups), expected)


def test_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match="2 weight groups need as many values, got 3"):
        expand_groups(torch.zeros(4, 3), 6, 3)
