"""One linear, four executions, the same integers and the same bits.

`binary`, `unrolled` and `collapsed` (native and reference backend) are compared with `torch.equal`:
integers because they are integers, outputs because all executions share the order of float operations.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurons.modes import COMMENSURATE_CAPACITY
from neurons.thresholds import unit_of
from snnllm.execution import View, set_view
from snnllm.kernels import NativeBackend
from snnllm.layout import LinearLayout
from snnllm.linear import SpikingLinear
from snnllm.weights import QuantizedWeight, round_to_nearest

COLLAPSED = ["reference", *(["native"] if NativeBackend().available() is None else [])]
EXECUTIONS = [(View.BINARY, "auto"), (View.UNROLLED, "auto")] + [
    (View.COLLAPSED, backend) for backend in COLLAPSED
]
SHAPES = [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)]


def inputs(shape: tuple[int, ...], channels: int, seed: int, dtype=torch.float32) -> Tensor:
    x = torch.randn(*shape, channels, generator=torch.Generator().manual_seed(seed)) * 3
    x[..., 0] *= 30  # an outlier channel, as LLaMA has
    if x.numel() > channels:
        x.reshape(-1, channels)[0] = x.reshape(-1, channels)[0].abs() * (-1) ** (seed % 2)
        x.reshape(-1, channels)[-1] *= seed % 3  # sometimes a row of zeros
    return x.to(dtype)


def executions(module: SpikingLinear, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Accumulators and output of every execution."""
    results = []
    for view, backend in EXECUTIONS:
        module.view, module.backend = view, backend
        module.invalidate()
        with torch.no_grad():
            results.append((module.accumulators(x), module(x)))
    return results


def oracle(module: SpikingLinear, x: Tensor) -> Tensor:
    """Centred accumulators from the decoded meaning: integers of x and w in float64."""
    spec, encoder = module.spec(), module.encoder
    encoding = encoder.encode(x.reshape(-1, x.shape[-1]))
    centred = encoder.centre(encoding)[:, module.order].double()
    parts = [
        centred[:, a:b] @ (spec.levels[:, a:b].double() - spec.zero[:, j, None]).T
        for a, b, _, j in spec.segments
    ]
    if encoding.multiple is not None:
        parts = [
            part * encoding.multiple[:, segment.act_group, None]
            for part, segment in zip(parts, spec.segments, strict=True)
        ]
    return torch.stack(parts).to(torch.int32)


def check(module: SpikingLinear, x: Tensor) -> None:
    expected = oracle(module, x)
    results = executions(module, x)
    for (view, backend), (accumulators, y) in zip(EXECUTIONS, results, strict=True):
        assert accumulators.dtype == torch.int32, (view, backend)
        assert torch.equal(accumulators, expected), (view, backend)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], module.out_features)
        assert torch.equal(y, results[0][1]), (view, backend)


@settings(max_examples=120, derandomize=True)
@given(
    steps=st.sampled_from([(1,), (2,), (1, 2), (1, 4), (1, 8), (1, 3), (1, 2, 4)]),
    bits=st.sampled_from([1, 2, 3, 4]),
    ratio=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    value_range=st.sampled_from(["split", "shared", "commensurate"]),
    weight_bits=st.sampled_from([2, 3, 4, 5, 8]),
    group_size=st.sampled_from([None, 8, 16]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shape=st.sampled_from(SHAPES),
    channels=st.sampled_from([1, 7, 24, 33, 64]),
    out=st.sampled_from([1, 10, 19]),
    seed=st.integers(0, 2**16),
)
def test_all_executions_are_equal(
    make_linear, steps, bits, ratio, value_range, weight_bits, group_size, bias, dtype, shape,
    channels, out, seed,
):  # fmt: skip
    if value_range == "commensurate" and len(steps) > 1:
        assume(steps[-1] * (2**bits - 1) <= COMMENSURATE_CAPACITY)
    module = make_linear(
        channels,
        out,
        seed=seed,
        weight_bits=weight_bits,
        bits=bits,
        steps=steps,
        ratio=ratio,
        value_range=value_range,
        group_size=group_size,
        bias=bias,
    )
    check(module, inputs(shape, channels, seed, dtype))


@pytest.mark.parametrize("steps", [(1, 2), (1, 4)])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_commensurate_sums_count_units(make_linear, steps, group_size, dtype, bias):
    """One int32 sum of all channels in units where the weight has one group."""
    fields = {"steps": steps, "group_size": group_size, "bias": bias}
    module = make_linear(40, 19, value_range="commensurate", **fields)
    x = inputs((70,), 40, 3, dtype)
    check(module, x)
    spec, encoding = module.spec(), module.encoder.encode(x)
    assert spec.merged == (group_size is None)
    assert spec.encoder.range_mode == 2
    unit = unit_of(encoding.threshold, encoding.multiple)
    sums = module.accumulators(x)
    if spec.merged:
        y = (unit * sums.sum(0, dtype=torch.int32).float()) * spec.scale[:, 0]
    else:
        terms = [
            (unit * a.float()) * spec.scale[:, s.weight_group]
            for a, s in zip(sums, spec.segments, strict=True)
        ]
        y = functools.reduce(torch.add, terms)
    y = y if spec.bias is None else y + spec.bias
    assert torch.equal(module(x), y.to(dtype))


@pytest.mark.parametrize("group_size", [None, 8])
def test_commensurate_with_an_offset(group_size):
    layout = LinearLayout(4, 4, (1, 2), "commensurate", "steps", group_size, offset=True)
    generator = torch.Generator().manual_seed(0)
    module = SpikingLinear(24, 10, False, layout, "layer")
    module.set_channel_group((torch.rand(24, generator=generator) < 0.3).to(torch.uint8))
    weight = torch.randn(10, 24, generator=generator)
    module.set_weight(round_to_nearest(weight[:, module.order], 4, group_size))
    module.set_offset(*(torch.randn(n, generator=generator) for n in (24, 10)))
    results = executions(module, inputs((2, 5), 24, 1))
    assert all(torch.equal(a, results[0][0]) for a, _ in results)
    assert all(torch.equal(y, results[0][1]) for _, y in results)


@pytest.mark.parametrize("weight_bits", [2, 8])
@pytest.mark.parametrize(("bits", "steps"), [(8, (1,)), (7, (1, 2)), (6, (1, 4)), (4, (1, 17))])
def test_counts_up_to_255(make_linear, bits, steps, weight_bits):
    module = make_linear(40, 9, bits=bits, steps=steps, weight_bits=weight_bits)
    assert max(module.encoder.capacities) > 250
    check(module, inputs((4,), 40, 0))


@pytest.mark.parametrize(("bits", "steps"), [(4, (1, 2)), (8, (1,))])
def test_autocast_changes_no_integer(make_linear, bits, steps):
    module = make_linear(200, 9, bits=bits, steps=steps, weight_bits=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(module, inputs((4,), 200, 0))


def test_extreme_weights_and_inputs():
    """All levels at one end and all counts at the other: the largest sums there are."""
    layout = LinearLayout(8, 8, (1,), "split", "steps", None)
    module = SpikingLinear(200, 2, False, layout)
    codes = torch.tensor([[255], [0]], dtype=torch.uint8).expand(2, 200)
    zero = torch.tensor([[0], [255]], dtype=torch.uint8)
    module.set_weight(QuantizedWeight(codes, torch.ones(2, 1), zero))
    x = torch.ones(2, 200)
    x[1] *= -1
    check(module, x)
    largest = 255 * 255 * 200
    assert module.accumulators(x)[0].tolist() == [[largest, -largest], [-largest, largest]]


@pytest.mark.parametrize("value_range", ["split", "shared", "commensurate"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_the_output_is_the_decoded_linear(make_linear, tolerance, value_range, group_size):
    module = make_linear(24, 10, group_size=group_size, value_range=value_range)
    x = inputs((5,), 24, 1)
    decoded = module.encoder.decode(module.encoder.encode(x))
    expected = torch.nn.functional.linear(decoded, module.dequantized_weight(), module.bias)
    scale = expected.abs().max()
    torch.testing.assert_close(
        module(x) / scale, expected / scale, rtol=0, atol=tolerance.reordered_sum
    )


@pytest.mark.parametrize(("weight_bits", "bits"), [(16, 4), (4, 16), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value_range", ["split", "commensurate"])
def test_float_operands_give_the_same_output_in_all_views(
    make_linear, weight_bits, bits, dtype, value_range
):
    steps = (1, 2) if value_range == "split" or bits == 4 else (1,)
    module = make_linear(weight_bits=weight_bits, bits=bits, steps=steps, value_range=value_range)
    x = inputs((2, 3), 24, 2, dtype)
    outputs = []
    for view in View:
        module.check_view(view)
        module.view = view
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_power_of_two_capacity_runs_collapsed_only(make_linear):
    module = make_linear(capacity="power_of_two", name="model.layers.3.mlp.up_proj")
    x = inputs((3,), 24, 0)
    assert module.encoder.capacities == (15, 31)
    results = []
    for backend in COLLAPSED:
        module.backend = backend
        module.invalidate()
        results.append(module(x))
        assert torch.equal(module.accumulators(x), oracle(module, x))
        assert torch.equal(results[-1], results[0])
    for view in (View.UNROLLED, View.BINARY):
        with pytest.raises(ValueError, match=r"3\.mlp\.up_proj: capacity='power_of_two'.*not"):
            module.check_view(view)
        module.view = view
        with pytest.raises(ValueError, match="capacity='power_of_two' has counts that a"):
            module(x)


def test_counts_beyond_eight_bits_run_unrolled_only(make_linear):
    module = make_linear(bits=8, steps=(1, 2), name="q_proj")
    x = inputs((3,), 24, 0)
    message = r"q_proj: counts up to 510 do not fit .* \(limit 255\)\. Use fewer bits or steps, or"
    with pytest.raises(ValueError, match=message):
        module(x)
    module.check_view(View.UNROLLED)
    module.view = View.UNROLLED
    assert torch.equal(module.accumulators(x), oracle(module, x))
    unrolled = module(x)
    module.view = View.BINARY
    assert torch.equal(module(x), unrolled)


@pytest.mark.parametrize("view", list(View))
def test_inputs_that_are_not_finite_name_the_layer(make_linear, view):
    module = make_linear(name="model.layers.7.mlp.down_proj")
    module.view = view
    x = inputs((3,), 24, 0)
    x[1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.7\.mlp\.down_proj.*NaN or inf"):
        module(x)


# -- content ----------------------------------------------------------------------------------------


def test_derived_tensors_follow_the_stored_ones(make_linear):
    module, other = make_linear(seed=1), make_linear(seed=2)
    x = inputs((4,), 24, 3)
    before = module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert not torch.equal(module(x), before)
    module.set_channel_group(torch.zeros(24, dtype=torch.uint8))
    assert module.spec().encoder.sizes == (24, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_do_not_touch_integers_and_scales(make_linear, dtype):
    module = make_linear()
    codes, scale = module.weight_codes.clone(), module.weight_scale.clone()
    module.to(dtype)
    assert module.bias.dtype == dtype
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(module.weight_codes, codes)
    assert module(inputs((2,), 24, 0)).dtype == torch.float32


def test_a_bias_on_one_side_only_is_refused(make_linear):
    module = make_linear(bias=False, name="k_proj")
    quantized = QuantizedWeight(module.codes(), module.weight_scale, module.weight_zero)
    with pytest.raises(ValueError, match="k_proj: the layer and its source disagree about a bias"):
        module.set_weight(quantized, torch.zeros(10))


def test_the_representation_says_what_runs(make_linear):
    text = repr(make_linear())
    assert "weight_bits=4, activation_bits=4, steps=(1, 2), view=collapsed" in text


@pytest.mark.parametrize("steps", [(1,), (1, 2), (2, 1), (1, 2, 4)])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_neurons_in_c_are_the_nodes(make_linear, steps, rows):
    module = make_linear(channels=37, out=21, steps=steps)
    x = torch.randn(rows, 37, generator=torch.Generator().manual_seed(1)) * 3
    set_view(module, View.UNROLLED)
    assert not module.encoder.watched
    stepped = module(x)
    module.encoder.node.store_v_seq = True  # now somebody records, so the nodes themselves run
    assert module.encoder.watched
    assert torch.equal(module(x), stepped)
    assert module.encoder.node.v_seq.shape == (max(steps), rows, 37)
    with pytest.raises(ValueError, match="layer"):
        module(x.new_full((2, 37), torch.nan))
    module.encoder.node.store_v_seq = False
    with pytest.raises(ValueError, match="layer"):
        module(x.new_full((2, 37), torch.nan))


def test_channel_groups_that_do_not_exist_are_refused(make_linear):
    module, before = make_linear(name="q_proj"), make_linear().encoder.channel_group
    for bad, message in (
        (torch.full((24,), 2, dtype=torch.uint8), r"must lie in 0\.\.1 .* got 2"),
        (torch.tensor(1, dtype=torch.uint8), r"must have one .*, shape \(24,\), got \(\)"),
    ):
        with pytest.raises(ValueError, match=f"q_proj: channel_group {message}"):
            module.set_channel_group(bad)
        with pytest.raises(ValueError, match=f"q_proj: channel_group {message}"):
            module.load_state_dict({**module.state_dict(), "encoder.channel_group": bad})
    assert torch.equal(module.encoder.channel_group, before)
    module.encoder.channel_group = torch.full((24,), 9, dtype=torch.uint8)
    module.invalidate()
    with pytest.raises(ValueError, match=r"q_proj: channel_group must lie in 0\.\.1"):
        module(inputs((2,), 24, 0))


@pytest.mark.parametrize("value_range", ["split", "commensurate"])
def test_compiled_linears_are_the_same(make_linear, value_range):
    torch.compiler.reset()
    module, x = make_linear(value_range=value_range), inputs((3,), 24, 5)
    expected = module(x)  # packs the weight
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
