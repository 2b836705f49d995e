"""The Triton encoder emits the integers of `SpikeEncoder`: in the interpreter, and on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurons import SpikeEncoder
from neurons.modes import ValueRange
from neurons.thresholds import unit_of

pytest.importorskip("triton", reason="needs triton (pip install triton)")

import itertools

import triton
import triton.language as tl

from neurons.backends import triton_encode
from neurons.backends.triton_encode import (
    ALIGNMENT,
    EncodedRows,
    encode_rows,
    padded,
    stable_layout,
)
from neurons.backends.triton_encode_row import quotient
from neurons.backends.triton_encode_tiles import runs_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "grid", "zero", "constant", "negative", "tiny", "huge"]
RANGES = ["split", "shared", "commensurate"]


def rows_of(kind: str, rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """Activations, among them those that lie exactly on ties."""
    x = torch.randn(rows, channels, generator=generator)
    x[:, :: max(1, channels // 3)] *= 20
    match kind:
        case "grid":  # s is a power of two, every x / s a multiple of 1/2
            x = (x * 2).round().clamp(-30, 30) / 2
            x[:, 0], x[:, -1] = -15.0, 15.0
        case "zero":
            x = torch.zeros_like(x)
        case "constant":
            x = torch.full_like(x, 3.7)
        case "negative":
            x = -x.abs()
        case "tiny":
            x = x * 1e-7
        case "huge":
            x = x * 500.0
    return x


class Case:
    """One input with an encoder, reproducible from a seed."""

    def __init__(
        self,
        kind: str,
        rows: int,
        channels: int,
        steps: tuple[int, ...],
        bits: int,
        value_range: str,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = rows_of(kind, rows, channels, generator).to(dtype).to(DEVICE)
        used = 1 + seed % len(steps)  # the last groups may be empty
        group = torch.randint(0, used, (channels,), generator=generator).to(torch.uint8)
        clips = torch.rand(len(steps), generator=generator) * 0.5 + 0.5
        clip = [1.0 if seed % 3 else float(c) for c in clips]
        if value_range == "commensurate":
            bits = min(bits, 4)  # a multiple of a count fits a byte
        self.encoder = SpikeEncoder(group, steps, bits, value_range, clip=clip).to(DEVICE)
        self.capacities = torch.tensor(self.encoder.capacities, dtype=torch.float32, device=DEVICE)
        self.offset = None
        if seed % 2:
            self.offset = torch.randn(channels, generator=generator).to(DEVICE)
        self.order, self.segments = stable_layout(self.encoder.channel_group, len(steps))
        if seed % 5 == 0:
            self.segments = split(self.segments)
        self.runs: list[int] | None = None

    def expected(self) -> EncodedRows:
        x = self.x if self.offset is None else self.x.float() - self.offset
        encoding = self.encoder.encode(x)
        return expected_rows(encoding, self.order, self.segments)

    def encoded(self, x: Tensor | None = None) -> EncodedRows:
        return encode_rows(
            self.x if x is None else x,
            self.order,
            self.segments,
            self.capacities,
            self.encoder.clip,
            ValueRange(self.encoder.value_range).code,
            self.offset,
            self.runs,
        )

    def fast(self) -> "Case":
        """The same, with what the host knows of the layout."""
        groups = len(self.capacities)
        self.runs = runs_of(self.order, self.segments, groups, self.x.shape[1])
        return self

    def salient_first(self, many: int) -> "Case":
        """Two groups, the second of which has the first channels, as behind a rotation."""
        self.encoder.channel_group[:] = (torch.arange(self.x.shape[1], device=DEVICE) < many).to(
            torch.uint8
        )
        self.order, self.segments = stable_layout(self.encoder.channel_group, 2)
        return self


def split(segments: Tensor) -> Tensor:
    """Every segment longer than one alignment in two, as weight groups do."""
    rows = []
    for start, stop, group in segments.tolist():
        cuts = [start, start + ALIGNMENT, stop] if stop - start > ALIGNMENT else [start, stop]
        rows += [(a, b, group) for a, b in itertools.pairwise(cuts)]
    return torch.tensor(rows, dtype=torch.int32, device=segments.device)


def expected_rows(encoding, order: Tensor, segments: Tensor) -> EncodedRows:
    count = encoding.count.index_select(1, order.clamp(min=0))
    count = torch.where(order >= 0, count, 0)
    _, threshold, zero_point, multiple = encoding
    if multiple is not None:
        for start, stop, group in segments.tolist():
            count[:, start:stop] *= multiple[:, group, None].to(count.dtype)
        threshold = unit_of(threshold, multiple).expand_as(threshold)
        zero_point = zero_point * multiple
    sums = [count[:, a:b].sum(1, dtype=torch.int32) for a, b, _ in segments.tolist()]
    return EncodedRows(count, threshold, zero_point, torch.stack(sums, 1))


def assert_same(got: EncodedRows, expected: EncodedRows) -> None:
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


cases = st.builds(
    Case,
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.sampled_from([1, 7, 64, 130, 300]),
    st.sampled_from([(1,), (2,), (1, 2), (1, 4), (1, 2, 3), (1, 1, 2, 3, 4)]),
    st.sampled_from([1, 2, 4, 6]),
    st.sampled_from(RANGES),
    st.sampled_from(FLOATS),
    st.integers(0, 2**16),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases)
def test_encode_rows_equals_the_encoder(case):
    assert_same(case.encoded(), case.expected())
    assert_same(case.fast().encoded(), case.expected())


@pytest.mark.gpu
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        st.sampled_from(KINDS),
        st.sampled_from([1, 3, 300]),
        st.sampled_from([576, 1536, 4096, 4100, 11008, 16384, 28672]),
        st.sampled_from([(1,), (1, 2), (1, 2, 3), (1,) * 20]),
        st.sampled_from([1, 4, 6]),
        st.sampled_from(RANGES),
        st.sampled_from(FLOATS),
        st.integers(0, 2**16),
    )
)
def test_encode_rows_equals_the_encoder_at_size(case):
    assert_same(case.encoded(), case.expected())
    assert_same(case.fast().encoded(), case.expected())
    if len(case.capacities) == 2:
        case.salient_first(case.x.shape[1] // 16 * 4).fast()
        assert_same(case.encoded(), case.expected())


@pytest.mark.parametrize(("channels", "mode"), [(1, 0), (64, 1), (100, 2), (300, 0)])
def test_the_original_order_needs_no_gather(channels, mode):
    case = Case("normal", 3, channels, (2,), 4, "split", torch.bfloat16, 1)
    got = encode_rows(
        case.x,
        None,
        ((0, padded(channels), 0),),
        torch.tensor([30.0], device=DEVICE),
        case.encoder.clip,
        mode,
        case.offset,
    )
    assert got.count.shape == (3, padded(channels))
    assert_same(got, case.expected())


@triton.jit
def divide(x_ptr, divisor_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    divisor = tl.load(divisor_ptr + at)
    inverse = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), divisor)
    tl.store(out_ptr + at, quotient(tl.load(x_ptr + at), divisor, inverse))


@pytest.mark.parametrize("kind", ["any", "near one", "integers"])
def test_the_quotient_by_an_inverse_is_that_of_ieee(kind):
    generator = torch.Generator().manual_seed(0)
    size = 2**18
    if kind == "any":  # every mantissa, quotients from 2**-30 to 2**30
        bits = torch.randint(0, 2**23, (2, size), generator=generator, dtype=torch.int32)
        exponents = torch.randint(112, 142, (2, size), generator=generator, dtype=torch.int32)
        x, divisor = (bits | exponents << 23).view(torch.float32)
    elif kind == "near one":  # mantissas with few zeros and few ones, where roundings are hard
        low = torch.randint(0, 64, (2, size), generator=generator, dtype=torch.int32)
        flip = torch.randint(0, 2, (2, size), generator=generator, dtype=torch.int32) * 0x7FFFFF
        x, divisor = ((low ^ flip) | 127 << 23).view(torch.float32)
    else:  # exact ties of the count
        x = torch.randint(-600, 600, (size,), generator=generator).float() / 2
        divisor = torch.randint(1, 256, (size,), generator=generator).float() / 8
    x, divisor = x.contiguous().to(DEVICE), divisor.contiguous().to(DEVICE)
    out = torch.empty_like(x)
    divide[(size // 4096,)](x, divisor, out, BLOCK=4096, enable_fp_fusion=False)
    assert torch.equal(out, x / divisor)


@pytest.mark.parametrize("value_range", ["split", "commensurate"])
@pytest.mark.parametrize("fast", [False, True])
def test_ranges_at_the_ends_of_float32(value_range, fast):
    case = Case("normal", 4, 130, (1, 2), 4, value_range, torch.float32, 3)
    case.offset = None
    scales = torch.tensor([3e36, 1e31, 1e-30, 1e-38], device=DEVICE).unsqueeze(1)
    case.x = case.x.clamp(-30, 30) * scales
    if fast:
        assert case.fast().runs is not None
    assert_same(case.encoded(), case.expected())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("steps", [(1, 2), (1, 2, 4), (1, 1, 1, 4)])
def test_units_of_groups_with_ranges_far_apart(steps, fast):
    case = Case("normal", 16, 200, steps, 4, "commensurate", torch.float32, 60 * 5 + 11)
    ratios = 2.0 ** torch.linspace(-12, 12, 16, device=DEVICE).unsqueeze(1)
    case.x = torch.where(case.encoder.channel_group == len(steps) - 1, case.x * ratios, case.x)
    if fast:
        assert case.fast().runs is not None
    assert_same(case.encoded(), case.expected())


def test_rows_may_lie_apart():
    case = Case("normal", 4, 130, (1, 2), 4, "split", torch.float32, 3)
    wide = torch.full((4, 333), float("nan"), device=DEVICE)
    wide[:, 5:135] = case.x
    assert_same(case.encoded(wide[:, 5:135]), case.expected())
    assert_same(case.encoded(case.x[:1].expand(4, -1)), case.encoded(case.x[:1].repeat(4, 1)))


def test_no_rows():
    case = Case("normal", 2, 70, (1, 2), 4, "split", torch.float32, 0)
    got = case.encoded(case.x[:0])
    assert [tuple(t.shape) for t in got] == [(0, 128), (0, 2), (0, 2), (0, len(case.segments))]


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("fast", [False, True])
def test_thresholds_tell_of_nan_and_infinity(value_range, clip, fast):
    from neurons import encode_parameters

    case = Case("normal", 6, 130, (1, 2, 2), 4, value_range, torch.float32, 2)
    case.encoder.clip.fill_(clip)
    inf, nan = float("inf"), float("nan")
    for row, value in enumerate((nan, inf, -inf)):
        case.x[row, 17 * row + 3] = value
    case.x[3, 5], case.x[3, 6] = inf, -inf
    case.x[4, 0], case.x[4, -1] = -nan, inf
    if fast:
        assert case.fast().runs is not None
    expected, _ = encode_parameters(
        case.x,
        case.encoder.channel_group,
        case.encoder.capacities,
        value_range,
        case.encoder.clip,
    )
    got = case.encoded()
    if value_range == "commensurate":  # one unit
        assert torch.equal(got.threshold.isfinite(), expected.isfinite())
    else:
        torch.testing.assert_close(got.threshold, expected, rtol=0, atol=0, equal_nan=True)
    assert not got.threshold[:5].isfinite().all(1).any()
    assert torch.equal(got.count[5:], case.encoded(case.x[5:]).count)


def test_opcheck():
    case = Case("normal", 3, 130, (1, 2), 4, "split", torch.float32, 1)
    arguments = (case.x, case.order, case.segments, case.capacities, case.encoder.clip, 0)
    positions = case.order.shape[0]
    for offset in (None, case.offset):
        torch.library.opcheck(
            torch.ops.neurons.encode_rows.default, (*arguments, offset, positions)
        )
    runs = case.fast().runs
    torch.library.opcheck(
        torch.ops.neurons.encode_rows.default, (*arguments, case.offset, positions, runs)
    )


def test_compiles_without_breaks():
    torch.compiler.reset()
    case = Case("normal", 3, 130, (1, 2), 4, "split", torch.float32, 1)
    compiled = torch.compile(
        lambda x: case.encoded(x * 2), fullgraph=True, backend="inductor" if CUDA else "aot_eager"
    )
    for rows in (3, 2):
        assert_same(compiled(case.x[:rows]), case.encoded(case.x[:rows] * 2))


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
def test_cuda_graphs_replay_it(fast):
    case = Case("normal", 3, 4096, (1, 2), 4, "split", torch.bfloat16, 1)
    if fast:
        case.fast()
    case.encoded()
    x, graph = case.x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.encoded(x)
    case.x.mul_(-1.5)
    x.copy_(case.x)
    graph.replay()
    assert_same(got, case.expected())


def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch):
    case = Case("normal", 2, 70, (1,), 4, "split", torch.float32, 0)
    monkeypatch.setattr(triton_encode, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need CUDA tensors, got one on cpu"):
        case.encoded(case.x.cpu())


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 70, dtype=torch.float64)}, TypeError, "x must be one of"),
        ({"x": torch.zeros(70)}, ValueError, r"x must be \[M, K\]"),
        ({"x": torch.zeros(70, 2).T}, ValueError, "stride 1 along K"),
        ({"order": torch.zeros(128)}, TypeError, r"order must be torch\.int32"),
        ({"order": torch.zeros(70, dtype=torch.int32)}, ValueError, "P a multiple of 64"),
        ({"clip": torch.ones(2)}, ValueError, r"clip must have shape \(1,\)"),
        ({"capacities": torch.ones(65), "clip": torch.ones(65)}, ValueError, "1 to 64 groups"),
        ({"offset": torch.zeros(69)}, ValueError, r"offset must have shape \(70,\)"),
        ({"offset": torch.zeros(140)[::2]}, ValueError, "offset must be contiguous"),
        ({"segments": torch.zeros(0, 3, dtype=torch.int32)}, ValueError, "at least one"),
        ({"runs": [0, 64, 70, 0]}, ValueError, "what runs_of says of the same layout"),
        ({"range_mode": 3}, ValueError, "range_mode must be 0, 1 or 2"),
        ({"segments": ((0, 70, 0),)}, ValueError, "multiples of 64"),
        ({"segments": ((0, 64, 0), (128, 192, 0))}, ValueError, "without gaps"),
        ({"segments": ((0, 64, 1), (64, 128, 0))}, ValueError, "ascend in their groups"),
    ],
)
def test_bad_arguments(monkeypatch, change, error, match):
    monkeypatch.setattr(triton_encode, "INTERPRETED", True)  # so that CPU tensors come this far
    arguments = {
        "x": torch.zeros(2, 70),
        "order": None,
        "segments": ((0, 128, 0),),
        "capacities": ONE,
        "clip": ONE,
        "range_mode": 0,
        "offset": None,
    }
    with pytest.raises(error, match=match):
        encode_rows(**arguments | change)
