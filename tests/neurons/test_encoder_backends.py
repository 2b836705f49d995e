"""`SpikeEncoder` in one Triton kernel: the integers of the torch reference, in any layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurons import Encoding, SpikeEncoder, backends

pytest.importorskip("triton", reason="needs triton (pip install triton)")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def activations(shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale
    x[..., 0] *= 20
    if seed % 3 == 0:  # s = 1 where the capacity is 15: every x / s a multiple of 1/2
        x = (x * 2).round().clamp(-15, 15) / 2
        x[..., 0], x[..., -1] = -7.5, 7.5
    return x


def both(encoder: SpikeEncoder, x: Tensor) -> tuple[Encoding, Encoding]:
    encodings = []
    for backend in ("torch", "triton"):
        encoder.backend = backend
        encodings.append(encoder.encode(x))
    return encodings[0], encodings[1]


def assert_same(got: Encoding, expected: Encoding) -> None:
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        if ours is theirs is None:  # multiples, of commensurate thresholds only
            continue
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def check(shape, steps, bits, value_range, clip, dtype, scale, per_head, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (shape[-3], shape[-1]) if per_head and len(shape) > 2 else shape[-1:]
    used = 1 + seed % len(steps)
    group = torch.randint(0, used, size, generator=generator).to(torch.uint8)
    clips = [1.0, 0.9, 0.7, 0.55][: len(steps)] if clip else 1.0
    encoder = SpikeEncoder(group, steps, bits, value_range, clip=clips).to(DEVICE)
    x = activations(shape, scale, seed).to(dtype).to(DEVICE)
    assert_same(*both(encoder, x))
    if len(shape) == 4:  # heads as attention has them: a transposed view
        view = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert_same(*both(encoder, view))


ranges = st.sampled_from(["split", "shared"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7,), (3, 7), (2, 3, 7), (2, 2, 3, 16), (1, 2, 1, 2, 5), (2, 130)]),
    steps=st.sampled_from([(1,), (2,), (1, 2), (1, 4), (1, 2, 3), (1, 2, 1, 3)]),
    bits=st.sampled_from([1, 4, 8]),
    value_range=ranges,
    clip=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1e-8, 0.01, 2.0, 300.0]),
    per_head=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_triton_equals_torch(shape, steps, bits, value_range, clip, dtype, scale, per_head, seed):
    check(shape, steps, bits, value_range, clip, dtype, scale, per_head, seed)


@pytest.mark.gpu
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(
        [
            (300, 576),
            (17, 4096),
            (400, 4100),
            (3, 11008),
            (2, 20000),
            (2, 8, 129, 64),
            (1, 3, 1, 128),
        ]
    ),
    steps=st.sampled_from([(1,), (1, 2), (1, 2, 3)]),
    bits=st.sampled_from([4, 8]),
    value_range=ranges,
    clip=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([0.01, 2.0]),
    per_head=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_triton_equals_torch_at_size(
    shape, steps, bits, value_range, clip, dtype, scale, per_head, seed
):
    check(shape, steps, bits, value_range, clip, dtype, scale, per_head, seed)


def test_channels_may_lie_apart():
    x = activations((9, 4), 2.0, 1).to(DEVICE).T  # [4, 9], stride 1 along the tokens
    assert_same(*both(SpikeEncoder(9, (2,)).to(DEVICE), x))
    assert_same(*both(SpikeEncoder(9, (2,)).to(DEVICE), x[:1].expand(3, -1)))


def test_ranges_at_the_ends_of_float32():
    x = activations((6, 40), 1.0, 1).to(DEVICE).clamp(-30, 30)
    x *= torch.tensor([3e36, 1.0, 1e31, 1e-30, 1e-38, 2e29], device=DEVICE).unsqueeze(1)
    group = (torch.arange(40) % 3 // 2).to(torch.uint8)
    for steps in ((1,), (1, 2)):
        encoder = SpikeEncoder(group * (len(steps) - 1), steps, 4).to(DEVICE)
        assert_same(*both(encoder, x))


def test_nothing_to_encode():
    encoding, _ = both(SpikeEncoder(9, (1,)).to(DEVICE), torch.zeros(0, 9, device=DEVICE))
    assert encoding.count.shape == (0, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_not_finite_names_the_layer(value, backend):
    x = activations((3, 7), 2.0, 1).to(DEVICE)
    x[1, 3] = value
    encoder = SpikeEncoder(7, (1,), name="mlp.up_proj", backend=backend).to(DEVICE)
    with pytest.raises(ValueError, match=r"mlp\.up_proj: activations hold NaN or inf"):
        encoder.encode(x)


def test_opcheck():
    group = torch.tensor([0, 1, 1, 0], dtype=torch.uint8, device=DEVICE)
    clip = torch.tensor([1.0, 0.5], device=DEVICE)
    x = activations((2, 4), 2.0, 1).to(DEVICE)
    for capacities in ([15, 30], [15, 300]):
        arguments = (x, group, capacities, clip, False)
        torch.library.opcheck(torch.ops.neurons.encode.default, arguments)


def test_compiles_without_breaks():
    torch.compiler.reset()
    encoder = SpikeEncoder(12, (2,), backend="triton").to(DEVICE)
    compiled = torch.compile(
        lambda x: encoder.encode(x + 1), fullgraph=True, backend="inductor" if CUDA else "aot_eager"
    )
    x = activations((3, 12), 2.0, 1).to(DEVICE)
    assert_same(compiled(x), encoder.encode(x + 1))


@pytest.mark.gpu
def test_cuda_graphs_replay_it():
    encoder = SpikeEncoder(4096, (2,), backend="triton").cuda()
    x = activations((3, 4096), 2.0, 1).cuda()
    encoder.encode(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = encoder.encode(x)
    x.mul_(-1.5)
    graph.replay()
    encoder.backend = "torch"
    assert_same(got, encoder.encode(x))


def test_auto_takes_what_suits():
    x = torch.zeros(2, 7, device=DEVICE)
    on_device = "triton" if CUDA else "torch"
    assert backends.choose_encode("auto", x, 1) == on_device
    assert backends.choose_encode("auto", x, 17) == "torch"
    assert backends.choose_encode("auto", x.double(), 1) == "torch"
    assert backends.choose_encode("auto", x.clone().requires_grad_(), 1) == "torch"
    assert "backend=auto" in repr(SpikeEncoder(7))


def zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, 7, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: SpikeEncoder(7, backend="cupy"), ValueError, "backend of an encoder must be one"),
        (
            lambda: SpikeEncoder(7, (1,) * 17, backend="triton").encode(zeros(torch.float32)),
            ValueError,
            "at most 16 channel groups, got 17",
        ),
        (
            lambda: SpikeEncoder(7, backend="triton").encode(zeros(torch.float64)),
            ValueError,
            r"got torch\.float64; convert the input",
        ),
    ],
)
def test_refusals(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_a_missing_backend_names_the_install_command(monkeypatch):
    monkeypatch.setitem(backends._INSTALLED, "triton", False)
    with pytest.raises(ImportError, match=r"pip install 'snnllm\[triton\]'"):
        SpikeEncoder(7, backend="triton")
