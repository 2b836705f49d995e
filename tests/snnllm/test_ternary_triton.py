"""Packed ternary weights on a GPU: exact digits, outputs within float32 rounding of the reference.

Without a GPU the kernels run in Triton's interpreter, so the sizes are small.
"""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snnllm.execution import View, use_view
from snnllm.kernels import ReferenceBackend, TritonBackend
from snnllm.kernels.ternary.pack import (
    BLOCKS,
    STRIDE,
    CountedTernary,
    PackedTernary,
    balanced_digits,
    digits_of,
    exact_in_float,
    pack_ternary,
    packed_linear,
)
from snnllm.layout import LinearLayout
from snnllm.step_allocation import MAX_STEPS, StepClass, classes_of, threshold_runs
from snnllm.ternary import TernaryWeight, dequantize_ternary
from snnllm.ternary_linear import TernaryLinear

REASON = TritonBackend().available()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
needs_triton = pytest.mark.skipif(REASON is not None, reason=f"triton kernels: {REASON}")
ROUNDING = {torch.float64: 2.0**-19, torch.float32: 2.0**-19, torch.float16: 2.0**-11}
# The interpreter truncates to bfloat16, where devices round.
ROUNDING |= {torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7}
"""Largest error of an output, relative to the sum of its `|x w|`; of halves, of the output too."""
CONFIGS = [(8, 1, 8, 4, 2), (8, 4, 8, 4, 2), (4, 16, 8, 4, 2), (1, 16, 32, 2, 2)]


def random_weight(
    seed: int, n: int, steps: list[int], group_size: int | None
) -> tuple[TernaryWeight, LinearLayout]:
    """Random spike counts of columns with some steps, and the layout that holds them."""
    generator = torch.Generator().manual_seed(seed)
    classes = classes_of(torch.tensor(steps))
    levels = torch.cat(
        [torch.randint(-t, t + 1, (n, count), generator=generator) for t, count in classes], 1
    )
    runs = threshold_runs(classes, group_size)
    threshold = (torch.rand(n, len(runs), generator=generator) + 0.01).half()
    order = torch.randperm(len(steps), generator=generator)
    layout = LinearLayout(2, 16, (1,), "split", "steps", group_size, classes=classes)
    return TernaryWeight(levels.to(torch.int8), threshold, order, classes), layout


def packed(trains: TernaryWeight, group_size: int | None) -> PackedTernary:
    levels, threshold, order, classes = trains
    return pack_ternary(
        levels.to(DEVICE), threshold.to(DEVICE), order.to(DEVICE), classes, group_size
    )


def unpacked(weight: PackedTernary) -> Tensor:
    """The real weight of a packed one, position by position, float64 `[N, channels]`."""
    codes = torch.stack([(weight.weight >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    digits = torch.where(codes == 3, -1, codes.int())
    blocks = len(weight.factor)
    values = digits.view(len(codes), 4, blocks, -1).transpose(1, 2).double()
    values = values * (2 * weight.scale.double() * weight.factor.double())[:, :, None, None]
    out = torch.zeros(len(codes), weight.channels + 1, dtype=torch.float64, device=values.device)
    order = weight.order[: 4 * weight.weight.shape[1]].long()
    order = torch.where(order < 0, weight.channels, order)
    return out.index_add_(1, order, values.flatten(1))


def check(x: Tensor, weight: PackedTernary, dense: Tensor, bias: Tensor | None) -> None:
    y = packed_linear(x, weight, bias, "layer")
    assert y.dtype == x.dtype
    dense = dense.double().to(x.device)
    expected, reach = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        expected, reach = expected + bias, reach + bias.abs()
    assert y.shape == expected.shape
    error = (y.double() - expected).abs()
    assert bool((error <= 2.0**-19 * reach + ROUNDING[x.dtype] * expected.abs()).all())


@given(st.integers(1, MAX_STEPS), st.integers(0, 2**16))
def test_balanced_digits_hold_every_level(steps: int, seed: int) -> None:
    count = digits_of(steps)
    levels = torch.arange(-steps, steps + 1, dtype=torch.int8)
    digits = balanced_digits(levels, count)
    assert sum(3**i * d.int() for i, d in enumerate(digits)).equal(levels.int())
    assert all(d.abs().max() <= 1 for d in digits)
    assert (3 ** (count - 1) - 1) // 2 < steps  # no fewer digits would do


def test_digits_of_the_usual_steps() -> None:
    assert [digits_of(t) for t in (1, 2, 4, 5, 13, 14, 127)] == [1, 2, 2, 3, 3, 4, 6]


@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 9),
    counts=st.lists(
        st.tuples(st.integers(1, MAX_STEPS), st.integers(1, 150)), min_size=1, max_size=3
    ),
    group_size=st.sampled_from([8, 64, 128, None]),
)
@settings(max_examples=30)
def test_packing_keeps_every_weight(
    seed: int, n: int, counts: list[tuple[int, int]], group_size: int | None
) -> None:
    steps = [t for t, count in counts for _ in range(count)]
    trains, _ = random_weight(seed, n, steps, group_size)
    weight = packed(trains, group_size)
    blocks, width = len(weight.factor), 4 * weight.weight.shape[1]
    assert width // blocks in BLOCKS
    assert len(weight.order) % (STRIDE * width // blocks) == 0
    assert (weight.order[width:] == -1).all()
    assert weight.scale.shape == (n, blocks)
    values = unpacked(weight).cpu()
    assert torch.equal(values[:, :-1].float(), dequantize_ternary(trains, group_size))
    assert not values[:, -1].any()  # padding holds silence


def test_a_spike_takes_two_bits() -> None:
    trains, _ = random_weight(0, 16, [1] * 1024, 128)
    weight = packed(trains, 128)
    assert weight.weight.nbytes == 16 * 1024 // 4
    assert weight.nbytes == weight.weight.nbytes + 16 * 8 * 2 + 8 * 4 + 1024 * 4


@pytest.fixture(params=CONFIGS, ids=str)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr("snnllm.kernels.ternary.operators.choose_config", lambda *_: request.param)


@needs_triton
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.usefixtures("config")
def test_every_tile_and_dtype(dtype: torch.dtype) -> None:
    trains, _ = random_weight(1, 11, [1] * 130 + [5] * 30 + [127], 64)
    x = torch.randn(6, 161, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    bias = torch.randn(11, device=DEVICE)
    check(x, packed(trains, 64), dequantize_ternary(trains, 64), bias)


@needs_triton
@given(
    seed=st.integers(0, 2**20),
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=3),
    group_size=st.sampled_from([32, 128, None]),
    bias=st.booleans(),
    dtype=st.sampled_from(list(ROUNDING)),
)
@settings(max_examples=25 if DEVICE == "cuda" else 6, deadline=None)
def test_any_linear(
    seed: int,
    m: int,
    n: int,
    counts: list[tuple[int, int]],
    group_size: int | None,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    steps = [t for t, count in counts for _ in range(count)]
    trains, _ = random_weight(seed, n, steps, group_size)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, len(steps), generator=generator) * 3).to(DEVICE, dtype)
    added = torch.randn(n, generator=generator).to(DEVICE) if bias else None
    check(x, packed(trains, group_size), dequantize_ternary(trains, group_size), added)


@needs_triton
def test_thresholds_at_the_ends_of_float16() -> None:
    trains, _ = random_weight(2, 4, [5] * 70, 32)
    trains.threshold[:2], trains.threshold[2:] = 65504.0, 2.0**-14
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(x, packed(trains, 32), dequantize_ternary(trains, 32), None)


@needs_triton
def test_a_row_does_not_depend_on_the_others() -> None:
    trains, _ = random_weight(3, 20, [1] * 200, 128)
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = packed(trains, 128)
    whole = packed_linear(x, weight, None)
    x[2] = torch.nan
    others = packed_linear(x, weight, None)
    assert torch.equal(others[[0, 1, 3]], whole[[0, 1, 3]])
    assert torch.isnan(others[2]).all()
    assert torch.equal(packed_linear(x.t().contiguous().t(), weight, None)[:2], whole[:2])


def layer(backend: str = "triton", bias: bool = True) -> TernaryLinear:
    trains, layout = random_weight(4, 24, [1] * 120 + [3] * 21, 64)
    module = TernaryLinear(141, 24, bias, layout, "layer")
    module.set_weight(trains, torch.linspace(-1, 1, 24) if bias else None)
    module.backend = backend
    return module.to(DEVICE).eval()


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_keeps_its_weight_packed(bias: bool) -> None:
    module, reference = layer(bias=bias), layer("reference", bias=bias)
    x = torch.randn(2, 3, 141, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = module.packed_weight()
    assert isinstance(weight, PackedTernary)
    check(x, weight, reference.dequantized_weight(), module.total_bias())
    y, expected = module(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert module.packed_weight() is weight
    assert module._levels is module._dense_weight is None  # nothing but the packed weight is kept
    for view in (View.UNROLLED, View.BINARY):
        with use_view(module, view):
            torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")
def test_a_changed_weight_is_seen(backend: str) -> None:
    module = layer(backend)
    kept = "_dense_weight" if backend == "reference" else "_packed_weight"
    x = torch.ones(1, 141, device=DEVICE)
    before = module(x)
    weight = getattr(module, kept)
    assert weight is not None
    assert torch.equal(module(x), before)
    assert getattr(module, kept) is weight  # not built at every call
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert getattr(same, kept) is None  # is derived again
        assert torch.equal(same(x), before)
    trains, _ = random_weight(5, 24, [1] * 120 + [3] * 21, 64)
    module.set_weight(trains, torch.zeros(24))
    assert not torch.equal(module(x), before)
    assert getattr(module, kept) is not weight


@needs_triton
def test_wrong_inputs_are_refused() -> None:
    module = layer()
    with pytest.raises(ValueError, match="layer: expected an input of 141 channels"):
        module(torch.zeros(2, 140, device=DEVICE))
    with pytest.raises(TypeError, match=r"layer: expected .* got torch\.int64"):
        module(torch.zeros(2, 141, dtype=torch.int64, device=DEVICE))


def spiking_layer(
    seed: int,
    n: int,
    steps: list[int],
    group_size: int | None,
    activation: tuple[int, tuple[int, ...], str],
    bias: bool = True,
) -> TernaryLinear:
    """A layer with spiking inputs: bits, steps of the saliency groups, range."""
    trains, _ = random_weight(seed, n, steps, group_size)
    bits, channel_steps, value_range = activation
    layout = LinearLayout(
        2, bits, channel_steps, value_range, "steps", group_size, classes=trains.classes
    )
    module = TernaryLinear(len(steps), n, bias, layout, "layer")
    generator = torch.Generator().manual_seed(seed)
    module.set_channel_group(
        torch.randint(len(channel_steps), (len(steps),), generator=generator).to(torch.uint8)
    )
    module.set_weight(trains, torch.randn(n, generator=generator) if bias else None)
    module.backend = "triton"
    return module.to(DEVICE).eval()


ACTIVATIONS = [
    (4, (1,), "split"),
    (4, (1, 2), "split"),
    (4, (1, 2), "shared"),
    (8, (1,), "split"),
    (2, (1, 3, 9), "split"),
]


def check_integers(module: TernaryLinear, x: Tensor) -> None:
    """The packed weight gives the accumulators and the outputs of the reference, bit for bit."""
    assert isinstance(module.packed_weight(), CountedTernary)
    sums, y = module.accumulators(x), module(x)
    reference = ReferenceBackend()
    expected = reference.prepare(module.spec())
    assert torch.equal(sums, reference.accumulate(x.reshape(-1, x.shape[-1]), expected))
    assert torch.equal(y, reference.linear(x, expected))
    assert y.dtype == x.dtype


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.usefixtures("config")
def test_spiking_inputs_give_the_integers_of_the_reference(
    activation: tuple[int, tuple[int, ...], str],
) -> None:
    module = spiking_layer(6, 11, [1] * 130 + [5] * 30 + [127], 64, activation)
    x = torch.randn(2, 3, 161, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_integers(module, x)


@needs_triton
@given(
    seed=st.integers(0, 2**20),
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    counts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=3),
    group_size=st.sampled_from([32, 128, None]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
@settings(max_examples=25 if DEVICE == "cuda" else 6, deadline=None)
def test_any_spiking_linear(
    seed: int,
    m: int,
    n: int,
    counts: list[tuple[int, int]],
    group_size: int | None,
    activation: tuple[int, tuple[int, ...], str],
    bias: bool,
    dtype: torch.dtype,
) -> None:
    steps = [t for t, count in counts for _ in range(count)]
    module = spiking_layer(seed, n, steps, group_size, activation, bias)
    x = torch.randn(m, len(steps), generator=torch.Generator().manual_seed(seed)) * 3
    check_integers(module, x.to(DEVICE, dtype))


@needs_triton
def test_the_views_of_a_packed_layer_agree() -> None:
    module = spiking_layer(7, 20, [1] * 150 + [2] * 60, 128, (4, (1, 2), "split"))
    x = torch.randn(3, 210, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for view in View:
        with use_view(module, view):
            results.append((module.accumulators(x).int(), module(x)))
    for sums, y in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(y, results[0][1])


def test_what_is_exact() -> None:
    columns = (StepClass(1, 200), StepClass(127, 200))
    assert exact_in_float(columns, 128, (255,))  # 128 * 364 * 255 < 2^24
    assert not exact_in_float(columns, None, (255,))
    assert exact_in_float((StepClass(1, 65536),), None, (256,))
    assert not exact_in_float((StepClass(1, 65537),), None, (256,))
    assert not exact_in_float((StepClass(1, 8),), None, (15, 257))


@needs_triton
def test_sums_beyond_float32_run_elsewhere() -> None:
    module = spiking_layer(8, 4, [127] * 200, None, (8, (1,), "split"))
    assert module.packed_weight() is None
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    reference = ReferenceBackend()
    expected = reference.prepare(module.spec())
    assert torch.equal(module.accumulators(x), reference.accumulate(x, expected))
    assert torch.equal(module(x), reference.linear(x, expected))


@needs_triton
def test_it_is_one_graph() -> None:

    x = torch.randn(3, 141, device=DEVICE)
    spiking = spiking_layer(9, 24, [1] * 120 + [3] * 21, 64, (4, (1, 2), "split"))
    for module in (layer(), spiking):
        with torch.no_grad():
            expected = module(x)
            compiled = torch.compile(
                module, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager"
            )
            assert torch.equal(compiled(x), expected)
    packed, counted = layer().packed_weight(), spiking.packed_weight()
    assert isinstance(packed, PackedTernary)
    assert isinstance(counted, CountedTernary)
    encoded = spiking.encoder.encode(x)
    whole = (*counted.packed.tensors, counted.segment, None, counted.segments)
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.snnllm
    torch.library.opcheck(
        operators.ternary_linear.default, (x, *packed.tensors, None), test_utils=tests
    )
    for dtype in (torch.int32, torch.float16):
        arguments = (*encoded[:3], counted.channel_group, *whole, dtype)
        torch.library.opcheck(operators.ternary_counts.default, arguments, test_utils=tests)
