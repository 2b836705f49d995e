"""SiLU * up, rotation and encoder fused: the bits of its parts, and of torch from the product on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from neurons import SpikeEncoder
from neurons.modes import ValueRange
from snnllm.hadamard import OnlineRotation, hadamard_transform, rotate_block

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from neurons.backends.triton_encode import encode_rows, stable_layout
from neurons.backends.triton_encode_tiles import runs_of
from snnllm.kernels.triton.swiglu import rotate, silu_mul, silu_mul_encode
from tests.neurons.test_triton_encode import expected_rows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def rows(count: int, channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, channels, generator=generator) * 2).to(dtype).to(DEVICE)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_butterflies_are_the_hadamard_matrix(size):
    x = rows(3, size, torch.float32, size).double()
    matrix = torch.from_numpy(hadamard(size)).double().to(DEVICE) / size**0.5
    torch.testing.assert_close(hadamard_transform(x), x @ matrix)


def test_the_order_of_operations_is_that_of_the_definition():
    x = rows(1, 64, torch.float32, 0)[0].cpu()
    values = list(x)
    for h in (1, 2, 4, 8, 16, 32):
        for i in range(64):
            if not i & h:
                a, b = values[i], values[i + h]
                values[i], values[i + h] = a + b, a - b
    expected = torch.stack(values) * 0.125
    assert torch.equal(hadamard_transform(x), expected)
    block = rotate_block(x)
    for i in range(4):
        for j in range(16):
            assert block[4 * j + i] == expected[16 * i + j]
    assert torch.equal(rotate_block(x[:16]), hadamard_transform(x[:16]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_is_that_of_torch(dtype):
    gate, up = rows(3, 1500, dtype, 0), rows(3, 1500, dtype, 1)
    gate[0, :3] = torch.tensor([-100.0, 0.0, 100.0])
    expected = torch.nn.functional.silu(gate) * up
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(gate, up), expected, rtol=tolerance, atol=1e-30)


SIZES = [(16,), (12,), (56, 8), (256, 64), (11, 4), (600, 32), (768,), (64, 512), (3, 2, 1)]


@settings(max_examples=24, deadline=None, derandomize=True)
@given(sizes=st.sampled_from(SIZES), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**16))
def test_rotate_gives_the_bits_of_torch(sizes, dtype, seed):
    x = rows(2, sum(sizes), dtype, seed)
    assert torch.equal(rotate(x, sizes), OnlineRotation(sizes)(x))


def check_fused(count, sizes, group, steps, dtype, rotated, value_range, known, seed) -> None:
    """`silu_mul_encode` is silu_mul, OnlineRotation and the encoder; `known`: the layout is."""
    channels = sum(sizes)
    gate, up = rows(count, channels, dtype, seed), rows(count, channels, dtype, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    encoder = SpikeEncoder(group, steps, 4, value_range, clip=0.9).to(DEVICE)
    offset = torch.randn(channels, generator=generator).to(DEVICE) if seed % 2 else None
    order, segments = stable_layout(encoder.channel_group, len(steps))
    capacities = torch.tensor(encoder.capacities, dtype=torch.float32, device=DEVICE)
    layout = (order, segments, capacities, encoder.clip, value_range.code, offset)
    runs = runs_of(order, segments, len(steps), channels) if known else None
    got = silu_mul_encode(gate, up, sizes if rotated else None, *layout, runs=runs)

    row = silu_mul(gate, up)
    row = OnlineRotation(sizes)(row) if rotated else row
    for ours, theirs in zip(got, encode_rows(row, *layout), strict=True):
        assert torch.equal(ours, theirs)
    encoding = encoder.encode(row if offset is None else row.float() - offset)
    for ours, theirs in zip(got, expected_rows(encoding, order, segments), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=30 if CUDA else 10, deadline=None, derandomize=True)
@given(
    sizes=st.sampled_from([sizes for sizes in SIZES if len(sizes) == 2]),
    salient=st.sampled_from(["none", "last", "first", "mixed"]),
    dtype=st.sampled_from(FLOATS),
    rotated=st.booleans(),
    value_range=st.sampled_from(list(ValueRange)),
    known=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_fused_is_its_parts(sizes, salient, dtype, rotated, value_range, known, seed):
    channels = sum(sizes)
    group = torch.zeros(channels, dtype=torch.uint8)
    if salient == "mixed":  # blocks of the rotation straddle groups
        generator = torch.Generator().manual_seed(seed)
        group = torch.randint(0, 2, (channels,), generator=generator).to(torch.uint8)
    elif salient != "none":
        group[sizes[0] :] = 1
        group = 1 - group if salient == "first" else group
    steps = (1,) if salient == "none" else (1, 2)
    check_fused(2, sizes, group, steps, dtype, rotated, value_range, known, seed)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_fused_with_commensurate_thresholds(rotated, known):
    group = (torch.arange(320) >= 256).to(torch.uint8)
    commensurate = ValueRange.COMMENSURATE
    for seed, dtype in enumerate(FLOATS):
        check_fused(2, (256, 64), group, (1, 2), dtype, rotated, commensurate, known, seed)
    group[:60] = 2
    check_fused(2, (256, 64), group, (1, 2, 4), dtype, rotated, commensurate, known, seed)


def test_few_and_many_rows_have_the_same_bits():
    gate, up = rows(70, 88, torch.bfloat16, 0), rows(70, 88, torch.bfloat16, 1)
    segments = torch.tensor([[0, 128, 0]], dtype=torch.int32, device=DEVICE)
    capacity, clip = torch.full((1,), 15.0, device=DEVICE), torch.ones(1, device=DEVICE)
    layout = ((80, 8), None, segments, capacity, clip, 0)
    whole = silu_mul_encode(gate, up, *layout)
    for many, few in zip(whole, silu_mul_encode(gate[:2], up[:2], *layout), strict=True):
        assert torch.equal(many[:2], few)


@pytest.mark.parametrize("sizes", [(56, 8), (256,)])
@pytest.mark.parametrize("value", [1e33, float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [0, 2])
def test_ranges_without_a_usable_threshold(sizes, value, mode):
    channels = sum(sizes)
    gate, up = rows(3, channels, torch.float32, 0), rows(3, channels, torch.float32, 1)
    up[1, 2], gate[1, 2] = value, 1.0
    group = (torch.arange(channels) >= sizes[0]).to(torch.uint8).to(DEVICE)
    steps = (1, 2)[: len(sizes)]
    order, segments = stable_layout(group, len(steps))
    capacities = torch.tensor([15.0, 30.0][: len(sizes)], device=DEVICE)
    layout = (order, segments, capacities, torch.ones_like(capacities), mode)
    runs = runs_of(order, segments, len(steps), channels)
    got = silu_mul_encode(gate, up, sizes, *layout, runs=runs)
    expected = encode_rows(OnlineRotation(sizes)(silu_mul(gate, up)), *layout)
    finite = torch.isfinite(expected.threshold)
    assert torch.equal(torch.isfinite(got.threshold), finite)
    assert torch.equal(got.threshold[finite], expected.threshold[finite])
    kept = finite.all(1)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[kept], theirs[kept])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1408, 128), (9984, 1024), (3584, 512), (13312, 1024), (27, 5)])
@pytest.mark.parametrize("count", [1, 700])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_is_its_parts_at_size(count, sizes, dtype):
    rotation, x = OnlineRotation(sizes), rows(count, sum(sizes), dtype, 1)
    assert torch.equal(rotate(x, sizes), rotation(x))
    assert torch.equal(rotation(x).cpu(), rotation(x.cpu()))
    group = (torch.arange(sum(sizes)) >= sizes[0]).to(torch.uint8)
    for seed, rotated in enumerate((True, False)):
        for value_range in (ValueRange.SPLIT, ValueRange.COMMENSURATE):
            check_fused(count, sizes, group, (1, 2), dtype, rotated, value_range, True, seed)


def test_opcheck_and_compilation():
    gate, up = rows(2, 24, torch.float32, 0), rows(2, 24, torch.float32, 1)
    sizes = (16, 8)
    segments = torch.tensor([[0, 64, 0]], dtype=torch.int32, device=DEVICE)
    capacity, clip = torch.full((1,), 15.0, device=DEVICE), torch.ones(1, device=DEVICE)
    layout = (None, segments, capacity, clip, 0, None)
    torch.library.opcheck(torch.ops.snnllm.silu_mul.default, (gate, up))
    torch.library.opcheck(torch.ops.snnllm.rotate.default, (gate, list(sizes)))
    for rotation in (list(sizes), []):
        for runs in ([0, 64, 24, 0], None):
            arguments = (gate, up, rotation, *layout, 64, runs)
            torch.library.opcheck(torch.ops.snnllm.silu_mul_encode.default, arguments)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda gate, up: silu_mul_encode(gate * 2, up, sizes, *layout),
        fullgraph=True,
        backend="inductor" if CUDA else "aot_eager",
    )
    expected = silu_mul_encode(gate * 2, up, sizes, *layout)
    for ours, theirs in zip(compiled(gate, up), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_no_rows():
    empty = torch.zeros(0, 24, device=DEVICE)
    assert silu_mul(empty, empty).shape == (0, 24)
    assert rotate(empty, (16, 8)).shape == (0, 24)


def test_refusals():
    x = torch.zeros(2, 24, device=DEVICE)
    with pytest.raises(ValueError, match="gate and up must be alike"):
        silu_mul(x, x.half())
    with pytest.raises(ValueError, match="groups of the rotation must have 24 channels together"):
        rotate(x, (16, 4))
    with pytest.raises(ValueError, match="groups of the rotation must have 24 channels together"):
        rotate(x, (24, 0))
