"""SiLU * up, rotation and encoder fused: the bits of its parts, and of torch from the product on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from neurons import SpikeEncoder
from snnllm.transforms import OnlineRotation, hadamard_transform, mix_blocks

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from neurons.backends.triton_encode import encode_rows, stable_layout
from snnllm.kernels.swiglu_triton import rotate, silu_mul, silu_mul_encode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def rows(count: int, channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, channels, generator=generator) * 2).to(dtype).to(DEVICE)


def rotation_of(sizes: tuple[int, ...], seed: int) -> OnlineRotation:
    generator = torch.Generator().manual_seed(seed)
    rotation, channels = OnlineRotation(sizes), sum(sizes)
    group = (torch.arange(channels) >= sizes[0])[torch.randperm(channels, generator=generator)]
    rotation.randomise(group, generator)
    return rotation.to(DEVICE)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_butterflies_are_the_hadamard_matrix(size):
    x = rows(3, size, torch.float32, size).double()
    matrix = torch.from_numpy(hadamard(size)).double().to(DEVICE) / size**0.5
    torch.testing.assert_close(hadamard_transform(x), x @ matrix)


def test_the_orders_are_those_of_the_definitions():
    x, left = rows(1, 12, torch.float32, 0)[0].cpu(), rows(3, 3, torch.float32, 1).cpu()
    values = list(x[:4])
    for h in (1, 2):
        for i in range(4):
            if not i & h:
                a, b = values[i], values[i + h]
                values[i], values[i + h] = a + b, a - b
    assert torch.equal(hadamard_transform(x[:4]), torch.stack(values) * 0.5)
    mixed = mix_blocks(left, x.view(3, 4))
    for i in range(3):
        total = left[0, i] * x[:4]
        for k in (1, 2):
            total = total + left[k, i] * x[4 * k : 4 * k + 4]
        assert torch.equal(mixed[i], total)


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_is_that_of_torch(dtype):
    gate, up = rows(3, 1500, dtype, 0), rows(3, 1500, dtype, 1)
    gate[0, :3] = torch.tensor([-100.0, 0.0, 100.0])
    expected = torch.nn.functional.silu(gate) * up
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(gate, up), expected, rtol=tolerance, atol=1e-30)


SIZES = [(16,), (12,), (56, 8), (24, 16), (11, 4), (120, 10), (768,)]


@settings(max_examples=24, deadline=None, derandomize=True)
@given(sizes=st.sampled_from(SIZES), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**16))
def test_rotate_gives_the_bits_of_torch(sizes, dtype, seed):
    rotation, x = rotation_of(sizes, seed), rows(2, sum(sizes), dtype, seed)
    assert torch.equal(rotate(x, rotation.tables()), rotation(x))


def check_fused(count, sizes, steps, dtype, rotated, shared, seed) -> None:
    channels = sum(sizes)
    gate, up = rows(count, channels, dtype, seed), rows(count, channels, dtype, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, len(steps), (channels,), generator=generator).to(torch.uint8)
    encoder = SpikeEncoder(group, steps, 4, "shared" if shared else "split", clip=0.9).to(DEVICE)
    offset = torch.randn(channels, generator=generator).to(DEVICE) if seed % 2 else None
    order, segments = stable_layout(encoder.channel_group, len(steps))
    capacities = torch.tensor(encoder.capacities, dtype=torch.float32, device=DEVICE)
    layout = (order, segments, capacities, encoder.clip, shared, offset)
    rotation = rotation_of(sizes, seed) if rotated else None
    got = silu_mul_encode(gate, up, None if rotation is None else rotation.tables(), *layout)

    row = silu_mul(gate, up)
    row = row if rotation is None else rotation(row)
    for ours, theirs in zip(got, encode_rows(row, *layout), strict=True):
        assert torch.equal(ours, theirs)
    encoding = encoder.encode(row if offset is None else row.float() - offset)
    assert torch.equal(got.threshold, encoding.threshold)
    assert torch.equal(got.zero_point, encoding.zero_point)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.sampled_from(SIZES),
    steps=st.sampled_from([(1,), (1, 2)]),
    dtype=st.sampled_from(FLOATS),
    rotated=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_fused_is_its_parts(sizes, steps, dtype, rotated, shared, seed):
    check_fused(2, sizes, steps, dtype, rotated, shared, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1408, 128), (9984, 1024), (8192,), (13312, 1024), (27, 5)])
@pytest.mark.parametrize("count", [1, 700])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_is_its_parts_at_size(count, sizes, dtype):
    rotation, x = rotation_of(sizes, 1), rows(count, sum(sizes), dtype, 1)
    assert torch.equal(rotate(x, rotation.tables()), rotation(x))
    assert torch.equal(rotation(x).cpu(), rotation.cpu()(x.cpu()))
    for seed, rotated in enumerate((True, False)):
        check_fused(count, sizes, (1, 2), dtype, rotated, False, seed)


def test_opcheck_and_compilation():
    gate, up = rows(2, 24, torch.float32, 0), rows(2, 24, torch.float32, 1)
    tables = rotation_of((16, 8), 0).tables()
    order, signs, left, sizes = tables
    segments = torch.tensor([[0, 64, 0]], dtype=torch.int32, device=DEVICE)
    capacity, clip = torch.full((1,), 15.0, device=DEVICE), torch.ones(1, device=DEVICE)
    layout = (None, segments, capacity, clip, False, None)
    torch.library.opcheck(torch.ops.snnllm.silu_mul.default, (gate, up))
    torch.library.opcheck(torch.ops.snnllm.rotate.default, (gate, order, signs, left, list(sizes)))
    for parts in ((order, signs, left, list(sizes)), (None, None, None, [])):
        arguments = (gate, up, *parts, *layout, 64)
        torch.library.opcheck(torch.ops.snnllm.silu_mul_encode.default, arguments)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda gate, up: silu_mul_encode(gate * 2, up, tables, *layout),
        fullgraph=True,
        backend="inductor" if CUDA else "aot_eager",
    )
    expected = silu_mul_encode(gate * 2, up, tables, *layout)
    for ours, theirs in zip(compiled(gate, up), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_no_rows():
    empty = torch.zeros(0, 24, device=DEVICE)
    assert silu_mul(empty, empty).shape == (0, 24)
    assert rotate(empty, rotation_of((16, 8), 0).tables()).shape == (0, 24)


def test_refusals():
    x = torch.zeros(2, 24, device=DEVICE)
    with pytest.raises(ValueError, match="gate and up must be alike"):
        silu_mul(x, x.half())
    with pytest.raises(ValueError, match="one or two groups of 24 channels"):
        rotate(x, rotation_of((16, 4), 0).tables())
    with pytest.raises(ValueError, match="one or two groups of 24 channels"):
        rotate(x, OnlineRotation((8, 8, 8)).to(DEVICE).tables())
    tables = rotation_of((16, 8), 0).tables()
    with pytest.raises(ValueError, match=r"left of the rotation must be torch\.float32 \[16\]"):
        rotate(x, tables._replace(left=tables.left[:2]))
    with pytest.raises(ValueError, match=r"signs of the rotation must be torch\.int8 \[24\]"):
        rotate(x, tables._replace(signs=tables.order))
