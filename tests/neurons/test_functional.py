"""The loop, the closed form and the trains are the same integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import layer

from neurons import functional

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
LEVELS = st.sampled_from([2, 3, 4, 16, 256])
STEPS = st.integers(1, 8)


def dyadic(seed: int, shape: tuple[int, ...], scale: float, bits: int = 6) -> torch.Tensor:
    """Charges in multiples of 2**-bits: every sum of them is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.round(torch.randn(shape, generator=generator) * scale * 2**bits) / 2**bits


def at_first_step(charge: torch.Tensor, steps: int) -> torch.Tensor:
    return torch.cat([charge[None], charge.new_zeros(steps - 1, *charge.shape)])


@PROPERTY
@given(levels=LEVELS, steps=STEPS, seed=st.integers(0, 2**16))
def test_count_equals_loop_when_charged_at_first_step(levels, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    capacity = steps * (levels - 1)
    charge = torch.randn(64, generator=generator) * capacity  # any float32, both signs
    bias = torch.randint(0, capacity + 1, (64,), generator=generator) + 0.5
    spikes, v = functional.gif_multi_step(at_first_step(charge, steps), bias, levels)
    count = functional.gif_count(charge, bias, capacity)
    assert torch.equal(spikes.sum(0), count)
    assert torch.equal(v, (charge + bias) - count)
    train = functional.count_to_spikes(count, levels, steps)
    assert train.dtype == torch.uint8
    assert torch.equal(train, spikes.to(torch.uint8))
    signed, _ = functional.signed_gif_multi_step(
        at_first_step(charge, steps), torch.zeros(64), levels
    )
    assert torch.equal(signed.sum(0), functional.signed_gif_count(charge, capacity))


@PROPERTY
@given(levels=LEVELS, steps=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**16))
def test_count_equals_loop_when_charged_evenly(levels, steps, seed):
    charge = dyadic(seed, (64,), levels * steps)
    even = (charge / steps).expand(steps, 64)
    spikes, _ = functional.gif_multi_step(even.abs(), torch.full((64,), 0.5), levels)
    count = functional.gif_count(charge.abs(), 0.5, steps * (levels - 1))
    assert torch.equal(spikes.sum(0), count)
    signed, _ = functional.signed_gif_multi_step(even, torch.zeros(64), levels)
    assert torch.equal(signed.sum(0), functional.signed_gif_count(charge, steps * (levels - 1)))


@PROPERTY
@given(levels=LEVELS, steps=STEPS, seed=st.integers(0, 2**16))
def test_count_equals_loop_for_falling_portions(levels, steps, seed):
    portions = dyadic(seed, (steps, 64), levels).abs().sort(0, descending=True).values
    charge, capacity = portions.sum(0), steps * (levels - 1)
    spikes, _ = functional.gif_multi_step(portions, torch.full((64,), 0.5), levels)
    assert torch.equal(spikes.sum(0), functional.gif_count(charge, 0.5, capacity))
    signed, _ = functional.signed_gif_multi_step(-portions, torch.zeros(64), levels)
    assert torch.equal(signed.sum(0), functional.signed_gif_count(-charge, capacity))


@PROPERTY
@given(levels=LEVELS, steps=STEPS, seed=st.integers(0, 2**16))
def test_count_equals_loop_with_steps_per_channel(levels, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    limit = torch.randint(1, steps + 1, (16,), generator=generator)
    charge = torch.randn(4, 16, generator=generator) * levels * steps
    x_seq, v = at_first_step(charge, steps), torch.full((4, 16), 0.5)
    spikes, _ = functional.gif_multi_step(x_seq, v, levels, limit)
    count = functional.gif_count(charge, 0.5, limit * (levels - 1))
    assert torch.equal(spikes.sum(0), count)
    assert torch.equal(functional.count_to_spikes(count, levels, steps, limit).float(), spikes)
    silent = torch.arange(steps)[:, None, None] >= limit
    assert not spikes[silent.expand_as(spikes)].any()
    signed, _ = functional.signed_gif_multi_step(x_seq, torch.zeros(4, 16), levels, limit)
    expected = functional.signed_gif_count(charge, limit * (levels - 1))
    assert torch.equal(signed.sum(0), expected)


@PROPERTY
@given(levels=LEVELS, steps=STEPS, seed=st.integers(0, 2**16))
def test_train_of_levels_is_train_of_binary_neuron(levels, steps, seed):
    capacity = steps * (levels - 1)
    charge = dyadic(seed, (8, 2), capacity)
    spikes, _ = functional.gif_multi_step(
        at_first_step(charge, steps), torch.full_like(charge, 0.5), levels
    )
    binary, _ = functional.gif_multi_step(
        at_first_step(charge, capacity), torch.full_like(charge, 0.5), 2
    )
    events = functional.spikes_to_events(spikes, levels)
    assert events.shape == (capacity, 8, 2)
    assert ((events == 0) | (events == 1)).all()
    assert torch.equal(events, binary)
    assert torch.equal(functional.events_to_spikes(events, levels), spikes)
    count = functional.spikes_to_count(spikes)
    assert count.dtype == torch.int32
    assert torch.equal(functional.spikes_to_count(events), count)


@PROPERTY
@given(capacity=st.sampled_from([1, 3, 15, 60]), seed=st.integers(0, 2**16))
def test_signed_events_decode_to_centred_count(capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    q, z = torch.randint(0, capacity + 1, (2, 5, 7), generator=generator)
    centred = (q - z).to(torch.int16)
    positive, negative = functional.signed_events(centred, capacity)
    assert positive.shape == (capacity, 5, 7)
    difference = positive.sum(0, dtype=torch.int32) - negative.sum(0, dtype=torch.int32)
    assert torch.equal(difference, centred.int())
    assert int(positive.sum() + negative.sum()) == int(centred.abs().sum())


def test_events_work_on_uint8_spikes_and_through_a_linear():
    spikes = torch.randint(0, 4, (2, 3, 8), dtype=torch.uint8)
    linear = torch.nn.Linear(8, 5, bias=False)
    linear.weight.data = torch.randint(-8, 8, (5, 8)).float()
    events = functional.spikes_to_events(spikes, 4)
    assert events.dtype == torch.float32
    gathered = functional.events_to_spikes(linear(events), 4)
    assert torch.equal(gathered, linear(spikes.float()))
    reference = layer.SpikeCountToBinary(3, always_convert=True)(spikes.float())
    assert torch.equal(events, reference)


def test_ties_unsigned_up_and_signed_toward_zero():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5])
    assert functional.gif_count(x, 0.5, 9).tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert functional.signed_gif_count(x, 9).tolist() == [-2, -1, 0, 0, 0, 1, 2]
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert functional.signed_gif_count(above, 9) == 1
    assert functional.signed_gif_count(torch.tensor(1e-30), 9) == 0


def test_tie_makes_the_signed_neuron_rest():
    spikes, v = functional.signed_gif_multi_step(
        at_first_step(torch.tensor([0.5, -0.5, 1.5, -1.5]), 6), torch.zeros(4), 4
    )
    assert spikes[0].tolist() == [0, 0, 1, -1]
    assert not spikes[1:].any()
    assert v.tolist() == [0.5, -0.5, 0.5, -0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_step_keeps_dtypes(dtype):
    x, v = torch.tensor([1.25, 3.5], dtype=dtype), torch.full((2,), 0.5)
    spike, after = functional.gif_step(x, v, 4)
    assert spike.dtype == dtype
    assert spike.tolist() == [1, 3]
    assert after.dtype == torch.float32
    assert after.tolist() == [0.75, 1.0]
    spike, after = functional.signed_gif_step(-x, v - 0.5, 4)
    assert spike.dtype == dtype
    assert spike.tolist() == [-1, -3]


def test_step_mask_silences_and_keeps_the_charge():
    x, fires = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    spike, v = functional.gif_step(x, torch.full((2,), 0.5), 4, fires)
    assert spike.tolist() == [2, 0]
    assert v.tolist() == [0.5, 2.5]
    spike, v = functional.signed_gif_step(-x, torch.zeros(2), 4, fires)
    assert spike.tolist() == [-2, 0]
    assert v.tolist() == [0.0, -2.0]


def test_multi_step_in_chunks_equals_whole():
    x_seq, v = torch.randn(6, 3, 5) * 4, torch.full((3, 5), 0.5)
    limit = torch.tensor([1, 2, 3, 4, 6])
    whole, end = functional.gif_multi_step(x_seq, v, 4, limit)
    head, middle = functional.gif_multi_step(x_seq[:2], v, 4, limit)
    tail, last = functional.gif_multi_step(x_seq[2:], middle, 4, limit, step=torch.tensor(2))
    assert torch.equal(torch.cat([head, tail]), whole)
    assert torch.equal(last, end)


def test_to_thresholds_is_ieee_division_in_float32():
    x = torch.randn(1000, dtype=torch.bfloat16)
    assert torch.equal(functional.to_thresholds(x, 1.0), x.float())
    scaled = functional.to_thresholds(x, 0.3)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, x.float() / torch.tensor(0.3))


def test_multi_step_without_steps_raises():
    with pytest.raises(ValueError, match="at least one time step"):
        functional.gif_multi_step(torch.zeros(0, 3), torch.zeros(3), 4)


@pytest.mark.parametrize("levels", [1, 257])
def test_count_to_spikes_levels_raise(levels):
    with pytest.raises(ValueError, match="levels must be 2 to 256"):
        functional.count_to_spikes(torch.zeros(3), levels, 1)


def test_count_to_spikes_time_steps_raise():
    with pytest.raises(ValueError, match="time_steps must be at least 1"):
        functional.count_to_spikes(torch.zeros(3), 4, 0)


@pytest.mark.parametrize(("count", "limit"), [([7], None), ([-1], None), ([4], torch.tensor([1]))])
def test_count_that_no_neuron_emits_raises(count, limit):
    with pytest.raises(ValueError, match="a neuron cannot emit the others"):
        functional.count_to_spikes(torch.tensor(count), 4, 2, limit)


def test_count_to_spikes_of_nothing():
    assert functional.count_to_spikes(torch.zeros(0, 3), 4, 2).shape == (2, 0, 3)


def test_events_of_a_broken_step_raise():
    with pytest.raises(ValueError, match="multiple of levels - 1 = 3 slots, got 4"):
        functional.events_to_spikes(torch.zeros(4, 2), 4)


def test_signed_events_beyond_capacity_raise():
    with pytest.raises(ValueError, match=r"-3\.\.3 \(the capacity\), got -4\.\.2"):
        functional.signed_events(torch.tensor([-4, 2]), 3)
