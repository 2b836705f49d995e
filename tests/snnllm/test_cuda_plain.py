"""The CUDA C++ encoder of rows as they are: on the CPU, with imitated instructions, and its machine code."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neurons.modes import ValueRange
from neurons.thresholds import parameters, unit_of

pytest.importorskip("triton", reason="the package triton is not installed")
from neurons.backends.triton_encode import encode_rows
from snnllm.kernels.cuda import driver as cuda_driver
from snnllm.kernels.cuda import encode_plain, encode_source, plain_source
from snnllm.kernels.cuda.driver import without
from snnllm.kernels.cuda.encode_plain import PlainRows, Shape, choose_shape, plain_launch
from snnllm.kernels.cuda.primitives import PREAMBLE, PRIMITIVES
from snnllm.kernels.triton.plain import encode_plain_rows
from tests.snnllm.cuda_resources import resources
from tests.snnllm.test_cuda_on_host import COMPILER, compiler_for, launched

on_host = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_compiler = pytest.mark.skipif(
    cuda_driver.compiler_missing() is not None, reason="NVRTC is not installed"
)
ENTRY = r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n, const float*) {
  run(blocks, threads, [&] {
    encode_plain(p[0], (const float*)p[1], (const float*)p[2], (const float*)p[3], (unsigned char*)p[4], (float*)p[5],
                 (int*)p[6], (int*)p[7], n[0]);
  });
}
"""
QUOTIENTS = r"""
extern "C" void launch(const float* x, const float* divisor, float* out, int many) {
  for (int i = 0; i < many; i++) out[i] = short_quotient(x[i], divisor[i], inverse_of(divisor[i]));
}
"""
INVERSES = r"""
extern "C" __global__ void inverses(const float* x, float* out) {
  const int i = 256 * blockIdx.x + threadIdx.x;
  out[i] = inverse_of(x[i]);
}
"""
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
CAPACITIES = (15, 30)
MODES = list(ValueRange)
OWN, ONE, GRID = range(3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


BODY = encode_source.ENCODING + encode_source.LAYOUT + plain_source.BODY


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, int]], Any]:
    """Compile the kernel with macros for the CPU."""
    return compiler_for(
        tmp_path_factory.mktemp("plain"),
        {"plain": BODY, "quotients": ""},
        {"plain": ENTRY, "quotients": QUOTIENTS},
    )


def layout(sizes: tuple[int, ...], front: bool = True) -> list[int]:
    """Runs of groups whose last one is in front of the others, or behind; segments of whole 128 positions."""
    runs, start, first = [], 0, sizes[-1] if front and len(sizes) == 2 else 0
    for size in sizes:
        stop = start + -(-size // 128) * 128
        runs += [start, stop, size, first]
        start, first = stop, 0 if front else first + size
    return runs


def expected(rows: PlainRows) -> tuple[Tensor, ...]:
    """Counts, thresholds, zero points and sums of the equations in torch, in the layout of the rows."""
    runs = torch.tensor(rows.runs).view(-1, 4).tolist()
    y = rows.x.float() if rows.offset is None else rows.x.float() - rows.offset
    group = torch.zeros(y.shape[1], dtype=torch.int64)
    for g, (_, _, many, first) in enumerate(runs):
        group[first : first + many] = g
    capacities = [int(c) for c in rows.capacities]
    found = parameters(y, group, capacities, MODES[rows.range_mode], rows.clip)
    threshold = found.threshold.expand(-1, len(runs))
    zero = found.zero_point.expand(-1, len(runs))
    charge = y / threshold[:, group] + (zero[:, group].float() + 0.5)
    count = torch.minimum(charge.floor().clamp(min=0), rows.capacities[group]).nan_to_num().int()
    if found.multiple is not None:
        unit = unit_of(threshold, found.multiple).expand(-1, len(runs))
        threshold, zero = unit, zero * found.multiple
        count = count * found.multiple[:, group]
    out = torch.zeros(len(y), runs[-1][1], dtype=torch.uint8)
    for start, _, many, first in runs:
        out[:, start : start + many] = count[:, first : first + many]
    sums = [out[:, start:stop].sum(1, dtype=torch.int32) for start, stop, _, _ in runs]
    return out, threshold, zero, torch.stack(sums, 1)


def values(many: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Rows `[M, K]`: random, in halves of thresholds, zeros, positive, negative, in turn."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(many, channels, generator=generator) * 3
    x[:, :2] *= 30
    x[1::5] = torch.randint(-15, 16, x[1::5].shape, generator=generator) * 0.5
    x[2::5] = 0
    x[3::5] = x[3::5].abs()
    x[4::5] = -x[4::5].abs()
    return x.to(dtype)


def encoded(build: Any, rows: PlainRows, shape: Shape | None) -> tuple[Tensor, ...]:
    many, groups = len(rows.x), len(rows.capacities)
    sizes = (((rows.runs or ())[-3], torch.uint8), (groups, FLOAT), *((groups, torch.int32),) * 2)
    outputs = tuple(torch.full((many, size), 77, dtype=dtype) for size, dtype in sizes)
    launched(build, "plain", plain_launch(rows, outputs, shape), late=(rows.x,))
    return outputs


@on_host
@pytest.mark.parametrize(
    ("sizes", "dtype", "shape", "options"),
    [
        ((64,), BRAIN, Shape(32, 1), {}),
        ((64,), HALF, Shape(32, 1), {"many": 6}),
        ((4096,), BRAIN, Shape(64, 1), {}),
        ((512, 64), BRAIN, Shape(32, 1), {"many": 70}),  # padding; more rows than start early
        ((512, 64), HALF, Shape(64, 1), {"front": False}),
        ((500, 76), BRAIN, Shape(64, 1), {}),  # in fours
        ((500, 76), FLOAT, Shape(32, 1), {"offset": True}),
        ((1536 - 192, 192), FLOAT, Shape(128, 1), {}),
        ((1536 - 192, 192), HALF, Shape(32, 1), {"offset": True, "clip": 0.7}),
        ((1536 - 192, 192), BRAIN, Shape(64, 1), {"mode": ONE, "clip": 0.3}),
        ((1536 - 192, 192), BRAIN, Shape(32, 1), {"mode": GRID}),
        ((1536 - 192, 192), FLOAT, Shape(64, 1), {"mode": GRID, "offset": True}),
        ((3584, 512), BRAIN, Shape(64, 1), {"capacities": (127, 255)}),
        ((3584, 512), BRAIN, Shape(512, 1), {"mode": GRID}),
        # Threads of one group, of 16 channels; warps of one, too, if groups end where they do.
        ((3584, 512), BRAIN, Shape(256, 1), {"mode": GRID}),
        ((3584, 512), FLOAT, Shape(256, 1), {"offset": True, "front": False}),
        ((3584, 512), HALF, Shape(256, 1), {"mode": ONE}),
        ((448, 64), BRAIN, Shape(32, 1), {"mode": GRID}),
        ((256, 8), BRAIN, Shape(64, 1), {"front": False}),  # threads beyond the end of the row
        ((512, 16), BRAIN, Shape(128, 1), {"front": False, "mode": GRID}),
        ((256, 24), BRAIN, Shape(64, 1), {"front": False, "mode": GRID, "many": 66}),
        ((4096 - 80, 80), HALF, Shape(256, 1), {"mode": GRID}),
        ((4096 - 80, 80), FLOAT, Shape(256, 1), {"offset": True}),
        # One warp makes the parameters; then three rows are rehearsed, too.
        ((3584, 512), HALF, Shape(256, 1), {"mode": GRID, "many": 65}),
        ((3584, 512), BRAIN, Shape(256, 1, 3), {"mode": GRID, "many": 65}),
        ((4096 - 80, 80), BRAIN, Shape(256, 1, 3), {"mode": GRID, "many": 65, "offset": True}),
        ((500, 76), FLOAT, Shape(256, 1), {"offset": True, "many": 65}),
        ((9984, 1024), BRAIN, Shape(128, 1), {"many": 5}),
        ((9984, 1024), HALF, Shape(256, 1), {"many": 5, "clip": 0.9}),
    ],
    ids=str,
)
def test_rows_are_encoded(
    build: Any, sizes: tuple[int, ...], dtype: torch.dtype, shape: Shape, options: dict[str, Any]
) -> None:
    channels, capacities = sum(sizes), options.get("capacities", CAPACITIES)[: len(sizes)]
    generator = torch.Generator().manual_seed(channels)
    offset = torch.randn(channels, generator=generator) / 8 if "offset" in options else None
    rows = PlainRows(
        *(values(options.get("many", 10), channels, dtype), offset),
        *(torch.tensor(capacities).float(), torch.full((len(sizes),), options.get("clip", 1.0))),
        *(layout(sizes, options.get("front", True)), options.get("mode", OWN)),
    )
    for mine, other in zip(encoded(build, rows, shape), expected(rows), strict=True):
        assert torch.equal(mine, other)


@on_host
@pytest.mark.parametrize("start", [4, 8])
def test_rows_may_lie_anywhere(build: Any, start: int) -> None:
    x = values(10, 600, BRAIN)[:, start : start + 576]
    one = torch.ones(2)
    rows = PlainRows(x, None, one * 15, one, layout((512, 64)), OWN)
    assert encode_plain._vector(rows, 64) == start
    shape = Shape(64, 1)
    for mine, other in zip(encoded(build, rows, shape), expected(rows), strict=True):
        assert torch.equal(mine, other)


@on_host
@pytest.mark.parametrize("mode", [OWN, ONE, GRID])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
@pytest.mark.parametrize(
    ("capacities", "sizes", "shape", "many"),
    [
        (CAPACITIES, (512, 64), Shape(64, 1), 10),
        ((1, 3), (512, 64), Shape(256, 1), 65),
        ((1, 63), (512, 64), Shape(64, 1), 10),
        (CAPACITIES, (960, 64), Shape(64, 1), 10),
        (CAPACITIES, (512, 512), Shape(64, 1), 10),
        (CAPACITIES, (3584, 512), Shape(256, 1, 7), 65),
    ],
    ids=["few", "many", "coarse", "thread of one", "warp of one", "many of one"],
)
def test_rows_out_of_range(
    build: Any,
    capacities: tuple[int, int],
    sizes: tuple[int, int],
    shape: Shape,
    many: int,
    dtype: torch.dtype,
    mode: int,
) -> None:
    """NaN and infinity make the thresholds of their groups not finite; long ranges are divided as torch does."""
    x = values(many, sum(sizes), dtype)
    largest = torch.finfo(dtype).max
    bad = [torch.nan, -torch.nan, torch.inf, -torch.inf]
    for row, value in enumerate(bad):
        x[row, 100 * row + 3] = value  # of the first group, but for the first row
    x[4] *= largest / 1000
    x[5, 70] = largest / 3
    x[6, 3] = -largest / 3
    x[7, 70], x[8, 70], x[9, 3] = largest, largest / 2, largest * 0.9
    ones = torch.ones(2)
    runs = layout(sizes)
    rows = PlainRows(x, None, torch.tensor(capacities).float(), ones, runs, mode)
    mine, other = encoded(build, rows, shape), expected(rows)
    finite = torch.isfinite(other[1])
    assert not finite.all(1)[:4].any()
    known, overflows = torch.isfinite(mine[1]), mode == GRID and min(capacities) == 1
    assert bool(finite[4 : 7 if overflows else None].all())
    assert bool(known[finite].all())
    assert overflows or torch.equal(known, finite)  # a finite unit may have an infinite multiple
    for first, second in zip(mine[1:], other[1:], strict=True):
        assert torch.equal(first[finite], second[finite])
    for g, (start, stop) in enumerate((runs[:2], runs[4:6])):
        seen = finite[:, g]
        assert torch.equal(mine[0][seen, start:stop], other[0][seen, start:stop])


@on_host
@pytest.mark.parametrize(
    ("many", "shape"), [(2, Shape(64, 1)), (65, Shape(256, 1, 65))], ids=["few", "many"]
)
def test_a_rehearsal_reads_and_writes_nothing_of_others(
    build: Any, many: int, shape: Shape
) -> None:
    ones = torch.ones(2)
    rows = PlainRows(torch.zeros(many, 576), torch.zeros(576), ones, ones, layout((512, 64)), GRID)
    sizes = ((640, torch.uint8), (2, FLOAT), (2, torch.int32), (2, torch.int32))
    outputs = tuple(torch.full((many, n), 77, dtype=dtype).share_memory_() for n, dtype in sizes)
    planned = plain_launch(rows, outputs, shape)
    arguments = (None, *planned.arguments[1:])  # who reads x crashes
    planned = planned._replace(arguments=arguments, macros={**planned.macros, "REHEARSAL_ONLY": 1})
    build("plain", planned.macros)
    child = os.fork()
    if child == 0:  # pragma: no cover
        launched(build, "plain", planned)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(bool((output == 77).all()) for output in outputs)


@pytest.mark.parametrize("bits", [8, 11])
def test_a_short_division_counts_as_the_rounded_one(bits: int) -> None:
    """For all x of so many bits, at the thresholds around every border of a count.

    A count is n or more where x / s lies above the midpoint of two floats: the first one whose sum with the bias
    rounds to n, and the one before. Signs of differences of numbers that are near are exact in double precision.
    """
    x, double = torch.arange(2 ** (bits - 1), 2**bits, dtype=FLOAT), torch.float64
    n = torch.arange(1, 256, dtype=double)
    bias = torch.arange(256, dtype=double)[:, None] + 0.5
    half_ulp = 2.0 ** (torch.ceil(torch.log2(n)) - 25)  # of the floats below n
    first = torch.unique((n - bias) - half_ulp)
    least = first.float()
    least = torch.where(least.double() < first, least.nextafter(torch.tensor(torch.inf)), least)
    middle = (least.double() + least.nextafter(torch.tensor(-torch.inf)).double()) / 2
    for border in middle.split(100):
        signed = torch.where(border[:, None] > 0, x, -x)
        threshold = (signed.double() / border[:, None]).float()
        for step in range(-2, 3):
            s = (threshold.view(torch.int32) + step).view(FLOAT)
            inverse = 1 / s
            error = (1 - s.double() * inverse.double()).float()
            part = error * inverse
            rest = (error.double() * part.double() + part.double()).float()
            near = signed.double() * inverse.double() - border[:, None]
            above = near + (signed * rest).double()
            assert torch.equal(above > 0, signed.double() - border[:, None] * s.double() > 0)
            assert bool((above != 0).all())


@on_host
@pytest.mark.parametrize("bits", [8, 19])
def test_quotients_by_few_bits_are_right_after_one_step(bits: int, build: Any) -> None:
    """Of numbers whose quotients lie as near to the middle of two floats as they can."""
    generator, double = torch.Generator().manual_seed(bits), torch.float64
    wide = torch.randint(1 << 18, 1 << 19, (300,), generator=generator)
    d = (torch.arange(1, 256) if bits == 8 else wide)[:, None].to(double)
    middle = (torch.randint(1 << 23, 1 << 24, (1, 4000), generator=generator) + 0.5).to(double)
    exponent = torch.floor(torch.log2(middle * d)) - 23
    whole = torch.round(middle * d / 2.0**exponent)
    for step in (-1, 0, 1):
        x = ((whole + step) * 2.0**exponent).float()
        divisor, mine = d.float().expand_as(x).contiguous(), torch.empty_like(x)
        numbers = (ctypes.c_void_p(t.data_ptr()) for t in (x, divisor, mine))
        build("quotients", {"OUT": 0}).launch(*numbers, ctypes.c_int(x.numel()))
        assert torch.equal(mine, x / divisor)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [64, 576, 4096, 11008, 16384])
@pytest.mark.parametrize("rows", [1, 16, 64, 256, 512, 4096, 16384])
def test_shapes_fit_the_device(rows: int, channels: int, size: int) -> None:
    shape = choose_shape(rows, channels, size, 132, shifted=False)
    assert shape.threads in (32, 64, 128, 256, 512)
    assert shape.threads * shape.resident <= 2048
    assert shape.resident <= 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"x": torch.zeros(2, 20480), "runs": [0, 20480, 20480, 0]}, "16384 channels"),
        ({"runs": None}, "neighbours"),
        ({"runs": [0, 128, 4, -1, 128, 256, 4, 4]}, "neighbours"),
        ({"runs": [0, 128, 6, 0, 128, 256, 2, 6]}, "in fours"),
        ({"x": torch.zeros(2, 9)[:, 1:]}, "in fours"),
    ],
    ids=["none", "channels", "unknown", "scattered", "fours", "apart"],
)
def test_other_rows_run_on_triton(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str | None
) -> None:
    one = torch.ones(1)
    rows = PlainRows(torch.zeros(2, 8), None, one, one, [0, 128, 8, 0], OWN)._replace(**change)
    assert "compute capability" in str(rows.unsuitable())
    monkeypatch.setattr(encode_plain, "without", lambda _device: None)
    found = rows.unsuitable()
    assert found is None if reason is None else reason in str(found)


@needs_compiler
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("many", [1, 256, 4096])
@pytest.mark.parametrize("sizes", [(3584, 512), (9984, 1024), (500, 76)], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "offset"])
def test_the_kernel_compiles_without_many_spills(
    monkeypatch: pytest.MonkeyPatch,
    shifted: bool,
    sizes: tuple[int, ...],
    many: int,
    dtype: torch.dtype,
) -> None:
    ones, x = torch.ones(len(sizes)), torch.empty(many, sum(sizes), dtype=dtype)
    offset = torch.empty(sum(sizes)) if shifted else None
    rows = PlainRows(x, offset, ones, ones, layout(sizes), GRID)
    shape = choose_shape(many, sum(sizes), dtype.itemsize, 132, shifted)
    planned = plain_launch(rows, (torch.empty(1, rows.runs[-3] if rows.runs else 0),), shape)
    known = shifted and dtype == HALF and many == 256  # up to 16 registers
    assert resources(monkeypatch, planned.source, planned.macros).spilled <= 64 * known


def operands(rows: PlainRows) -> tuple[Any, ...]:
    """Arguments of `encode_plain_rows`, and of `encode_rows`: x, layout, mode, offset, runs."""
    runs = torch.tensor(rows.runs).view(-1, 4).tolist()
    order = torch.full((runs[-1][1],), -1, dtype=torch.int32)
    for start, _, many, first in runs:
        order[start : start + many] = torch.arange(first, first + many, dtype=torch.int32)
    table = [[start, stop, g] for g, (start, stop, _, _) in enumerate(runs)]
    layout = (order, torch.tensor(table, dtype=torch.int32), rows.capacities, rows.clip)
    moved = (None if t is None else t.to(DEVICE) for t in (rows.x, *layout, rows.offset))
    x, *on_device, offset = moved
    return (x, *on_device, rows.range_mode, offset, rows.runs)


@pytest.mark.parametrize(("mode", "dtype"), [(OWN, BRAIN), (GRID, FLOAT)])
def test_the_operator_is_one_of_torch(mode: int, dtype: torch.dtype) -> None:
    sizes, offset = (28, 4), torch.randn(32) if mode == OWN else None
    tops, ones = torch.tensor(CAPACITIES).float(), torch.ones(2)
    rows = PlainRows(values(3, 32, dtype), offset, tops, ones, layout(sizes), mode)
    arguments = operands(rows)
    torch.library.opcheck(torch.ops.snnllm.encode_plain_rows.default, arguments)
    for mine, other in zip(encode_plain_rows(*arguments), expected(rows), strict=True):
        assert torch.equal(mine.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-98, -17, -1, 0, 7, 98])
def test_inverses_are_rounded_correctly(exponent: int) -> None:
    """Of all numbers of a binade: the instruction is an approximation, and one Newton step is to be enough."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = without(device)
    if reason is not None:
        pytest.skip(f"CUDA C++ kernels: {reason}")
    source = PREAMBLE + PRIMITIVES + INVERSES
    kernel = cuda_driver.load(source, (("OUT", 0),), "inverses", 256, 0, device)
    x = (torch.arange(2**23, dtype=torch.int32, device=device) | (127 + exponent) << 23).view(FLOAT)
    mine = torch.empty_like(x)
    kernel(len(x) // 256, (x, mine))
    assert torch.equal(mine, (1 / x.double()).float())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096,), (3584, 512), (9984, 1024), (500, 76)], ids=str)
@pytest.mark.parametrize("many", [1, 64, 65, 4096])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_on_a_device_it_makes_what_triton_makes(
    dtype: torch.dtype, many: int, sizes: tuple[int, ...]
) -> None:
    reason = without(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(f"CUDA C++ kernels: {reason}")
    x, groups = values(many, sum(sizes), dtype), len(sizes)
    if many > 1:
        x[-1, 1], x[-2, 2] = torch.inf, torch.nan
    if many > 1 and dtype != HALF:
        # Thresholds that the short division does not take, and those beyond 1e30.
        x[-3], x[-4] = x[-3] * 1e24, x[-4] * 1e34
    for mode in (OWN, ONE, GRID):
        offset = torch.randn(sum(sizes)) if mode != ONE else None
        clip = torch.full((groups,), 0.9 if mode == ONE else 1.0)
        tops = torch.tensor(CAPACITIES[:groups]).float()
        rows = PlainRows(x, offset, tops, clip, layout(sizes), mode)
        arguments = operands(rows)
        mine, theirs = encode_plain_rows(*arguments), encode_rows(*arguments)
        finite = torch.isfinite(theirs[1]).all(1)
        assert torch.equal(torch.isfinite(mine[1]).all(1), finite)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a[finite], b[finite])
