"""The encoder: the same integers by closed form and by neurons, for every shape, dtype and mode."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import monitor

from neurons import (
    Capacity,
    Encoding,
    GIFNode,
    SpikeEncoder,
    encode_parameters,
    functional,
    spike_capacity,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
RANGES = ["split", "shared"]
SHAPES = {"row": (7,), "tokens": (3, 7), "batch": (2, 3, 7), "heads": (2, 4, 5, 7)}


def activations(seed: int, shape: tuple[int, ...], scale: float = 2.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    x[..., 0] *= 20  # an outlier channel, as LLaMA has
    return x


def groups_of(seed: int, shape: tuple[int, ...], groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (shape[-3], shape[-1]) if len(shape) == 4 else shape[-1:]
    return torch.randint(0, groups, size, generator=generator, dtype=torch.uint8)


def reference(x, group, steps, levels, value_range):
    """The equations of the method, one row, one head and one group at a time."""
    if group.dim() == 2:
        rows = [
            reference(x[..., h, :, :], group[h], steps, levels, value_range)
            for h in range(group.shape[0])
        ]
        return tuple(torch.stack(parts, -3) for parts in zip(*rows, strict=True))
    x = x.float()
    count, decoded = torch.zeros_like(x), torch.zeros_like(x)
    scales = []
    for g, t in enumerate(steps):
        member = group == g
        pool = x if value_range == "shared" else x[..., member]
        zero = torch.zeros(*x.shape[:-1], 1)
        pool = torch.cat([pool, zero], -1)
        lo, hi = pool.min(-1, keepdim=True).values, pool.max(-1, keepdim=True).values
        capacity = torch.tensor(float(t * (levels - 1)))
        s = torch.maximum((hi - lo) / capacity, torch.tensor(1e-5))
        z = torch.round(-lo / s).clamp(0, t * (levels - 1))
        q = torch.floor(x[..., member] / s + (z + 0.5)).clamp(0, t * (levels - 1))
        count[..., member], decoded[..., member] = q, s * (q - z)
        scales.append((s, z))
    threshold, zero_point = (torch.cat(parts, -1) for parts in zip(*scales, strict=True))
    return count, decoded, threshold, zero_point


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(list(SHAPES.values())),
    steps=st.sampled_from([(1,), (2,), (1, 2), (1, 4), (3, 1), (1, 2, 4)]),
    bits=st.sampled_from([1, 2, 4, 8]),
    value_range=st.sampled_from(RANGES),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1e-8, 0.01, 2.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_neurons_closed_form_and_equations_agree(
    shape, steps, bits, value_range, dtype, scale, seed
):
    x = activations(seed, shape, scale).to(dtype)
    group = groups_of(seed, shape, len(steps))
    encoder = SpikeEncoder(group, steps, bits, value_range)
    encoding = encoder.encode(x)
    count, decoded, threshold, zero_point = reference(x, group, steps, 2**bits, value_range)
    assert torch.equal(encoding.count.float(), count)
    assert torch.equal(encoding.threshold, threshold)
    assert torch.equal(encoding.zero_point.float(), zero_point)
    assert torch.equal(encoder.decode(encoding), decoded)

    spikes, from_spikes = encoder.encode_spikes(x)
    assert spikes.dtype == torch.float32
    assert spikes.shape == (max(steps), *shape)
    assert encoding.multiple is from_spikes.multiple is None
    for ours, theirs in zip(from_spikes[:3], encoding[:3], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(functional.spikes_to_count(spikes), encoding.count.int())
    aligned = group if group.dim() == 1 else group[:, None]
    limit = torch.tensor(steps)[aligned.long()]
    train = functional.count_to_spikes(encoding.count, 2**bits, max(steps), limit)
    assert torch.equal(train.float(), spikes)

    centred = encoder.centre(encoding)
    positive, negative = functional.signed_events(centred, max(encoder.capacities))
    events = positive.sum(0, dtype=torch.int32) - negative.sum(0, dtype=torch.int32)
    assert torch.equal(events, centred.int())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.sampled_from([1, 2, 4]),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**16),
)
def test_error_is_at_most_one_threshold(steps, bits, seed):
    """Half a threshold of rounding, and half of one more where z is rounded at the range's end."""
    x = activations(seed, (5, 16))
    encoder = SpikeEncoder(16, (steps,), bits)
    encoding = encoder.encode(x)
    error = (encoder.decode(encoding) - x).abs()
    assert (error <= encoding.threshold * 1.001).all()
    assert error.mean() <= encoding.threshold.max() * 0.5


@pytest.mark.parametrize("value_range", RANGES)
def test_groups_of_one_kind_equal_single_group(value_range):
    x = activations(0, (3, 7))
    one = SpikeEncoder(7, (2,), 4).encode(x)
    two = SpikeEncoder(torch.ones(7, dtype=torch.uint8), (1, 2), 4, value_range).encode(x)
    assert torch.equal(one.count, two.count)
    assert torch.equal(one.threshold[..., 0], two.threshold[..., 1])
    assert torch.equal(one.zero_point[..., 0], two.zero_point[..., 1])


def test_empty_group_has_the_smallest_threshold_and_no_bias():
    encoding = SpikeEncoder(torch.zeros(7, dtype=torch.uint8), (1, 2)).encode(
        activations(0, (3, 7))
    )
    assert torch.equal(encoding.threshold[:, 1], torch.full((3,), 1e-5))
    assert not encoding.zero_point[:, 1].any()


def test_shared_thresholds_are_commensurate_and_bias_charges_separate():
    group = groups_of(0, (7,), 2)
    x = activations(1, (200, 7))
    threshold, zero_point = encode_parameters(x, group, (15, 30), "shared")
    torch.testing.assert_close(threshold[:, 0], 2 * threshold[:, 1])
    assert (zero_point[:, 1] != 2 * zero_point[:, 0]).any()


@pytest.mark.parametrize("heads", [False, True])
def test_one_sided_constant_and_zero_rows(heads):
    rows = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    group = torch.tensor([0, 1, 0], dtype=torch.uint8)
    encoder = SpikeEncoder(torch.stack([group, group]) if heads else group, (1, 2), 4)
    x = torch.stack([rows, rows]) if heads else rows
    encoding = encoder.encode(x)
    z, capacity = encoding.zero_point, torch.tensor([15, 30])
    assert (z[..., 0, :] == 0).all()
    assert (z[..., 1, :] == capacity).all()
    decoded = encoder.decode(encoding)
    assert (decoded - x).abs().max() <= encoding.threshold.max() / 2 + 1e-6
    torch.testing.assert_close(decoded[..., 2, :], x[..., 2, :])
    assert not decoded[..., 3, :].any()
    assert (encoding.threshold[..., 3, :] == 1e-5).all()


@pytest.mark.parametrize("value_range", RANGES)
def test_zero_encodes_to_zero(value_range):
    x = activations(0, (50, 7))
    x[:, 3] = 0.0
    encoder = SpikeEncoder(groups_of(3, (7,), 2), (1, 2), 4, value_range)
    assert not encoder.centre(encoder.encode(x))[:, 3].any()


def test_signed_centring_is_small_for_small_values():
    encoder = SpikeEncoder(7, (1,))
    centred = encoder.centre(encoder.encode(activations(0, (3, 7))))
    assert centred.dtype == torch.int16
    assert centred.abs().max() <= 15


def test_rows_are_independent():
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2))
    x = activations(0, (6, 7))
    whole = encoder.encode(x)
    parts = [encoder.encode(row) for row in x]
    assert torch.equal(torch.stack([p.count for p in parts]), whole.count)
    assert torch.equal(torch.stack([p.threshold for p in parts]), whole.threshold)


def test_empty_batch_and_non_contiguous_input():
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2))
    assert encoder.encode(torch.zeros(0, 7)).count.shape == (0, 7)
    spikes, encoding = encoder.encode_spikes(torch.zeros(0, 7))
    assert spikes.shape == (2, 0, 7)
    assert encoding.threshold.shape == (0, 2)
    x = activations(0, (7, 5)).T
    assert torch.equal(encoder.encode(x).count, encoder.encode(x.contiguous()).count)


@pytest.mark.parametrize(
    ("steps", "bits", "dtype"), [((1, 17), 4, torch.uint8), ((1, 18), 4, torch.int16)]
)
def test_count_dtype_follows_capacity(steps, bits, dtype):
    encoder = SpikeEncoder(groups_of(0, (7,), 2), steps, bits)
    x = activations(0, (3, 7))
    assert encoder.encode(x).count.dtype == dtype
    assert encoder.encode_spikes(x)[1].count.dtype == dtype


def test_decode_dtype_and_forward():
    encoder, x = SpikeEncoder(7), activations(0, (3, 7))
    encoding = encoder(x)
    assert isinstance(encoding, Encoding)
    exact = encoder.decode(encoding)
    assert torch.equal(encoder.decode(encoding, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_is_straight_through(dtype):
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2))
    x = activations(0, (3, 7)).to(dtype).requires_grad_()
    x_hat = encoder.quantize(x)
    assert x_hat.dtype == dtype
    assert torch.equal(x_hat, encoder.decode(encoder.encode(x), dtype))
    weight = torch.randn(3, 7).to(dtype)
    (grad,) = torch.autograd.grad((x_hat * weight).sum(), x)
    assert torch.equal(grad, weight)


# ---- the node


def test_monitors_and_membranes():
    encoder = SpikeEncoder(torch.tensor([0, 1, 0], dtype=torch.uint8), (1, 2), 2)
    encoder.node.store_v_seq = True
    x = activations(0, (4, 3))
    with (
        monitor.OutputMonitor(encoder, GIFNode) as spikes,
        monitor.AttributeMonitor("v_seq", False, encoder, GIFNode) as membranes,
    ):
        train, encoding = encoder.encode_spikes(x)
        assert torch.equal(spikes["node"][0], train)
        assert membranes["node"][0].shape == train.shape
    group = encoder.channel_group.long()
    charged = x / encoding.threshold[:, group] + (encoding.zero_point[:, group] + 0.5)
    expected = charged - train.cumsum(0)
    assert torch.equal(encoder.node.v_seq, expected)


def test_no_state_from_call_to_call():
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2))
    x, other = activations(0, (3, 7)), activations(1, (5, 7))
    first, _ = encoder.encode_spikes(x)
    encoder.encode_spikes(other)
    again, _ = encoder.encode_spikes(x)
    assert torch.equal(first, again)
    assert encoder.node.v == encoder.node.v_init


def test_loaded_groups_reach_the_neurons():
    group = groups_of(0, (7,), 2)
    source, target = SpikeEncoder(group, (1, 2)), SpikeEncoder(7, (1, 2))
    target.load_state_dict(source.state_dict())
    assert list(source.state_dict()) == ["channel_group", "clip"]
    x = activations(0, (3, 7))
    assert torch.equal(target.encode(x).count, source.encode(x).count)
    assert torch.equal(target.encode_spikes(x)[0], source.encode_spikes(x)[0])
    twin = copy.deepcopy(source)
    assert torch.equal(twin.encode_spikes(x)[0], source.encode_spikes(x)[0])


def test_meta_construction():
    with torch.device("meta"):
        encoder = SpikeEncoder(7, (1, 2))
    assert encoder.channel_group.is_meta
    state = {"channel_group": groups_of(0, (7,), 2), "clip": torch.ones(2)}
    encoder.load_state_dict(state, assign=True)
    assert encoder.encode_spikes(activations(0, (3, 7)))[0].shape == (2, 3, 7)


@pytest.mark.parametrize("value_range", [*RANGES, "commensurate"])
def test_compile_fullgraph(value_range):
    torch.compiler.reset()
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2), value_range=value_range)
    x = activations(0, (3, 7))
    compiled = torch.compile(encoder.encode, fullgraph=True, backend="aot_eager")(x)
    for ours, theirs in zip(compiled, encoder.encode(x), strict=True):
        assert torch.equal(ours, theirs) if ours is not None else theirs is None


def test_repr():
    text = repr(SpikeEncoder(7, (1, 2), name="q_proj"))
    for part in ("channels=(7,)", "steps=(1, 2)", "bits=4", "value_range=split", "q_proj"):
        assert part in text


# ---- capacity


def test_spike_capacity():
    assert [spike_capacity(t, 4) for t in (1, 2, 4)] == [15, 30, 60]
    assert [spike_capacity(t, 4, "power_of_two") for t in (1, 2, 4)] == [15, 31, 63]
    with pytest.raises(ValueError, match=r"needs steps 1, 2, 4, \.\.\., got 3"):
        spike_capacity(3, 4, "power_of_two")


def test_unknown_modes_raise():
    with pytest.raises(ValueError, match=r"\['steps', 'power_of_two'\], got 'all'"):
        spike_capacity(2, 4, "all")
    with pytest.raises(ValueError, match=r"\['split', 'shared', 'commensurate'\], got 'own'"):
        encode_parameters(torch.zeros(7), torch.zeros(7, dtype=torch.uint8), (15,), "own")


def test_power_of_two_encodes_and_refuses_to_spike():
    encoder = SpikeEncoder(7, (2,), capacity=Capacity.POWER_OF_TWO, name="up_proj")
    encoding = encoder.encode(activations(0, (3, 7)))
    assert encoding.count.max() == 31
    with pytest.raises(ValueError, match="up_proj: neurons cannot emit the capacity power_of_two"):
        encoder.encode_spikes(torch.zeros(7))


# ---- errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["encode", "encode_spikes"])
@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_name_the_layer(bad, method, value_range, dtype):
    encoder = SpikeEncoder(groups_of(0, (7,), 2), (1, 2), 4, value_range, name="layers.3.q_proj")
    for channel in (0, 6):
        x = activations(0, (3, 7)).to(dtype)
        x[1, channel] = bad
        with pytest.raises(ValueError, match=r"layers\.3\.q_proj: activations hold NaN or inf"):
            getattr(encoder, method)(x)


def test_range_beyond_float32_raises():
    with pytest.raises(ValueError, match=r"SpikeEncoder: activations hold .* beyond float32"):
        SpikeEncoder(2).encode(torch.tensor([3e38, -3e38]))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        ((7,), {"bits": 4.0}, TypeError, "bits must be an int, got float"),
        ((7,), {"bits": 0}, ValueError, "bits must be 1 to 8, got 0"),
        ((7,), {"bits": 9}, ValueError, "bits must be 1 to 8, got 9"),
        (
            (7,),
            {"value_range": "own"},
            ValueError,
            r"\['split', 'shared', 'commensurate'\], got 'own'",
        ),
        ((7,), {"capacity": "all"}, ValueError, r"\['steps', 'power_of_two'\], got 'all'"),
        ((7, 2), {}, TypeError, "steps must be a sequence of ints"),
        ((7, (1.0,)), {}, TypeError, "steps must be a sequence of ints"),
        ((7, (True,)), {}, TypeError, "steps must be a sequence of ints"),
        ((7, ()), {}, ValueError, "at least one group and steps >= 1"),
        ((7, (1, 0)), {}, ValueError, "at least one group and steps >= 1"),
        ((7, (129,), 8), {}, ValueError, "capacity 32895 exceeds 32767"),
        ((0,), {}, ValueError, "channel count must be >= 1, got 0"),
        ((torch.zeros(7),), {}, TypeError, "uint8 tensor or a channel count, got torch.float32"),
        (([0, 1],), {}, TypeError, "uint8 tensor or a channel count, got list"),
        ((torch.zeros(1, 2, 3, dtype=torch.uint8),), {}, ValueError, r"\[C\] or \[H, C\]"),
        ((torch.zeros(0, dtype=torch.uint8),), {}, ValueError, "not empty"),
        ((torch.ones(7, dtype=torch.uint8),), {}, ValueError, r"0\.\.0 \(steps has 1 groups\)"),
    ],
)
def test_bad_arguments(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        SpikeEncoder(*args, **kwargs)


@pytest.mark.parametrize("shape", [(6,), (3, 8), ()])
def test_wrong_channels_name_the_layer(shape):
    with pytest.raises(ValueError, match=r"k_proj: expected activations \[\.\., C\]"):
        SpikeEncoder(7, name="k_proj").encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(7,), (4, 7), (3, 4, 7), (2, 3, 4, 7), (2, 4, 5, 8)])
def test_wrong_heads_name_the_layer(shape):
    encoder = SpikeEncoder(torch.zeros(4, 7, dtype=torch.uint8), name="k")
    with pytest.raises(ValueError, match=r"k: expected activations \[\.\., H, S, C\]"):
        encoder.encode(torch.zeros(shape))


def test_integer_activations_raise():
    with pytest.raises(TypeError, match=r"expected floating-point activations, got torch\.int64"):
        SpikeEncoder(7).encode(torch.zeros(7, dtype=torch.int64))


# ---- groups that change


BAD_GROUPS = {
    "too_large": (
        torch.full((7,), 2, dtype=torch.uint8),
        ValueError,
        r"must lie in 0\.\.1 .*got 2",
    ),
    "shape": (torch.zeros(6, dtype=torch.uint8), ValueError, r"shape \(7,\), got \(6,\)"),
    "scalar": (torch.tensor(1, dtype=torch.uint8), ValueError, r"shape \(7,\), got \(\)"),
    "heads": (torch.zeros(1, 7, dtype=torch.uint8), ValueError, r"shape \(7,\), got \(1, 7\)"),
    "wide": (torch.full((7,), 256), TypeError, r"must be a uint8 tensor .*got torch\.int64"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
@pytest.mark.parametrize("way", ["set", "load", "assign"])
def test_groups_that_do_not_exist_are_refused_by_name(case, way):
    bad, error, message = BAD_GROUPS[case]
    before = groups_of(0, (7,), 2)
    encoder = SpikeEncoder(before.clone(), (1, 2), name="k_proj")
    load = partial(encoder.load_state_dict, {"channel_group": bad}, assign=way == "assign")
    change = partial(encoder.set_groups, bad) if way == "set" else load
    with pytest.raises(error, match=f"k_proj: .*{message}"):
        change()
    assert torch.equal(encoder.channel_group, before)


def test_groups_can_be_changed():
    encoder, group = SpikeEncoder(7, (1, 2)), groups_of(0, (7,), 2)
    encoder.set_groups(group)
    assert torch.equal(encoder.channel_group, group)
    assert encoder.channel_group is not group
    encoder.channel_group = group + 2  # as a loader may, past load_state_dict
    with pytest.raises(ValueError, match=r"SpikeEncoder: channel_group must lie in 0\.\.1"):
        encoder.check_groups()
