"""Commensurate thresholds: those of split ranges, rounded up to multiples of one unit per token."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurons import SpikeEncoder, ValueRange
from neurons.modes import LARGEST_CHARGE, check_commensurate
from neurons.thresholds import MIN_THRESHOLD, commensurate, encode_parameters, parameters, unit_of

CAPACITIES = [(15,), (15, 30), (15, 60), (15, 15, 45), (31, 62), (7, 14), (1, 2), (3, 63)]


def thresholds(rows: int, groups: int, seed: int, spread: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponent = (torch.rand(rows, groups, generator=generator) - 0.5) * math.log2(spread)
    level = torch.rand(rows, 1, generator=generator) * 20 - 10
    return torch.exp2(exponent + level)


def single(x: float) -> float:
    """x as the nearest float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def cut(x: float) -> float:
    """x, a float32, without its last five bits."""
    (bits,) = struct.unpack("I", struct.pack("f", x))
    return float(struct.unpack("f", struct.pack("I", bits & ~31))[0])


def by_hand(s: list[float], capacities: tuple[int, ...]) -> tuple[float, list[int]]:
    """Unit and multiples of one token, number by number.

    Quotients and products of float32 in float64, rounded to float32, are those of float32.
    """
    most = [255 // c for c in capacities]
    best: tuple[float, float, list[int]] | None = None
    for n in range(most[-1], max(most[-1] - 4, 0), -1):
        parts = [single(a / b) for a, b in zip(s, [*most[:-1], n], strict=True)]
        unit = cut(single(max(parts) * (1 + 2**-18)))
        multiple = [min(math.ceil(single(a / unit)), b) for a, b in zip(s, most, strict=True)]
        cost = max(single(single(unit * m) / a) for a, m in zip(s, multiple, strict=True))
        if best is None or cost < best[0]:
            best = cost, unit, multiple
    assert best is not None
    return best[1:]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    capacities=st.sampled_from([c for c in CAPACITIES if len(c) > 1]),
    spread=st.sampled_from([1.0, 4.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_unit_and_multiples_are_those_of_the_method(capacities, spread, seed):
    s = thresholds(8, len(capacities), seed, spread)
    unit, multiple = commensurate(s, capacities)
    for row, u, m in zip(s.tolist(), unit.flatten().tolist(), multiple.tolist(), strict=True):
        assert by_hand(row, capacities) == (u, m)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    capacities=st.sampled_from(CAPACITIES),
    lead=st.sampled_from([(), (1,), (6,), (2, 3), (0,), (2, 3, 4)]),
    spread=st.sampled_from([1.0, 4.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_thresholds_are_multiples_of_one_unit(capacities, lead, spread, seed):
    groups = len(capacities)
    s = thresholds(math.prod(lead), groups, seed, spread).view(*lead, groups)
    unit, multiple = commensurate(s, capacities)
    assert unit.shape == (*lead, 1)
    assert multiple.shape == s.shape
    if groups == 1:
        assert torch.equal(unit, s)
        assert torch.equal(multiple, torch.ones_like(s))
        return
    raised = unit * multiple
    assert torch.equal(multiple, multiple.round())
    assert (multiple >= 1).all()
    assert (multiple * torch.tensor(capacities) <= LARGEST_CHARGE).all()
    if min(capacities) >= 8:  # multiples below 32
        assert torch.equal(raised.double(), unit.double() * multiple.double())
    assert (raised >= s * (1 - 1e-6)).all()
    assert torch.equal(unit_of(raised, multiple), unit)


@pytest.mark.parametrize(
    ("capacities", "most", "mean"), [((15, 30), 1.18, 1.025), ((15, 60), 1.5, 1.06)]
)
def test_how_much_similar_ranges_raise_a_threshold(capacities, most, mean):
    ratio = torch.exp2(torch.linspace(-2, 2, 20001))
    s = torch.stack([torch.ones_like(ratio), ratio], -1)
    unit, multiple = commensurate(s, capacities)
    raised = unit * multiple / s
    assert raised.max() < most
    assert raised.mean() < mean


def test_one_group_is_split():
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    group = torch.zeros(9, dtype=torch.uint8)
    ours, split = (parameters(x, group, (255,), r) for r in ("commensurate", "split"))
    assert torch.equal(ours.threshold, split.threshold)
    assert torch.equal(ours.zero_point, split.zero_point)
    assert ours.multiple.tolist() == [[1]] * 5
    assert split.multiple is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [0, 1])
def test_rows_that_are_not_finite_stay_so(value, group):
    s = thresholds(3, 2, 0)
    s[1, group] = abs(value)
    unit, multiple = commensurate(s, (15, 30))
    finite = torch.isfinite(unit * multiple)
    assert finite.all(1).tolist() == [True, False, True]
    channel_group = torch.tensor([0, 1], dtype=torch.uint8)
    encoder = SpikeEncoder(channel_group, (1, 2), value_range="commensurate")
    x = torch.ones(3, 2)
    x[1, group] = value
    with pytest.raises(ValueError, match="activations hold NaN or inf"):
        encoder.encode(x)


@pytest.mark.parametrize("clip", [1.0, (0.9, 0.6)])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("steps", [(1,), (1, 2), (1, 4), (1, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding(steps, heads, clip, dtype):
    generator = torch.Generator().manual_seed(len(steps))
    shape = (3, 16) if heads else (16,)
    group = torch.randint(len(steps), shape, generator=generator).to(torch.uint8)
    x = (torch.randn(2, 3, 20, 16, generator=generator) * 3).to(dtype)
    x[0, 0, 0] = 0.0
    x[0, 0, 1] = x[0, 0, 1].abs()
    factors = clip if isinstance(clip, float) else (*clip, 0.7)[: len(steps)]
    ours, split = (
        SpikeEncoder(group, steps, 4, r, clip=factors) for r in ("commensurate", "split")
    )
    found, expected = ours.encode(x), split.encode(x)
    assert expected.multiple is None
    assert found.multiple.dtype == torch.int32
    assert found.multiple.shape == found.threshold.shape
    unit, multiple = commensurate(expected.threshold, ours.capacities)
    assert torch.equal(found.threshold, unit * multiple)
    assert torch.equal(found.multiple, multiple.int())
    if clip == 1.0:  # then nothing saturates, as with split ranges: see test_encoder
        error = (ours.decode(found) - x.float()).abs()
        assert (error <= found.threshold.amax(-1, keepdim=True) * 1.001).all()
    assert not ours.decode(found)[0, 0, 0].any()  # zeros stay zeros
    spikes, stepped = ours.encode_spikes(x)
    assert torch.equal(spikes.sum(0).to(torch.uint8), found.count)
    assert all(torch.equal(a, b) for a, b in zip(stepped, found, strict=True))
    threshold, zero_point = encode_parameters(
        x, group, ours.capacities, ValueRange.COMMENSURATE, ours.clip
    )
    assert torch.equal(threshold, found.threshold)
    assert torch.equal(zero_point, found.zero_point)


def test_rows_of_zeros_have_the_least_threshold():
    encoder = SpikeEncoder(torch.tensor([0, 1, 1], dtype=torch.uint8), (1, 2), 4, "commensurate")
    encoding = encoder.encode(torch.zeros(4, 3))
    assert (encoding.threshold >= MIN_THRESHOLD * (1 - 1e-6)).all()
    assert not encoding.count.any()
    assert not encoding.zero_point.any()


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ((15, 64), "capacities of at most 63, got .*; use fewer bits or steps"),
        ((255, 510), "capacities of at most 63"),
        ((30, 15), "need the largest capacity in the last channel group"),
    ],
)
def test_refused_capacities(capacities, message):
    with pytest.raises(ValueError, match=f"q_proj: .*{message}"):
        check_commensurate(capacities, "q_proj")
    with pytest.raises(ValueError, match=message):
        commensurate(torch.ones(1, 2), capacities)
    group = torch.tensor([0, 1], dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        encode_parameters(torch.ones(2), group, capacities, "commensurate")


def test_an_encoder_refuses_them_with_its_name():
    with pytest.raises(ValueError, match="up_proj: commensurate thresholds of several"):
        SpikeEncoder(7, (1, 2), 8, "commensurate", name="up_proj")
    assert SpikeEncoder(7, (1,), 8, "commensurate").capacities == (255,)


def test_codes_of_the_kernels():
    codes = {str(value_range): value_range.code for value_range in ValueRange}
    assert codes == {"split": 0, "shared": 1, "commensurate": 2}
