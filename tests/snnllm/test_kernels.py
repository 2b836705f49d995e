"""Collapsed integer execution: every backend against an int64 oracle, and against each other."""

from __future__ import annotations

import itertools
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from neurons.encoder import Encoding, SpikeEncoder
from snnllm import kernels
from snnllm.kernels import (
    Backend,
    EncoderSpec,
    LinearSpec,
    NativeBackend,
    ReferenceBackend,
    Segment,
    TritonBackend,
    get_backend,
    segments_of,
)
from snnllm.kernels.cpu import backend as native_module
from snnllm.kernels.cpu import compiler
from snnllm.kernels.disk_cache import CACHE_VARIABLE, cache_directory
from snnllm.kernels.epilogue import in_units
from snnllm.kernels.exact import exact_matmul
from snnllm.kernels.reference import OperandKind, int_mm
from snnllm.kernels.spec import MAX_GROUPS

REFERENCE, NATIVE = ReferenceBackend(), NativeBackend()
PORTABLE = NativeBackend(("-DSNN_PORTABLE",))
REASON = NATIVE.available()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
BACKENDS = [
    pytest.param(REFERENCE, id="reference"),
    # What CUDA runs: torch._int_mm, which the CPU has, too.
    pytest.param(ReferenceBackend(OperandKind.INT8), id="reference-int8"),
    pytest.param(NATIVE, id="native", marks=needs_compiler),
    pytest.param(PORTABLE, id="portable", marks=needs_compiler),
]


def make_spec(
    generator: torch.Generator,
    n: int = 37,
    sizes: tuple[int, ...] = (50, 13),
    capacities: tuple[int, ...] = (15, 30),
    bits: int = 4,
    weight_groups: int = 1,
    value_range: str = "split",
) -> LinearSpec:
    k, high = sum(sizes), 2 ** (bits - 1)
    group = torch.arange(k) * weight_groups // k
    return LinearSpec(
        encoder=EncoderSpec(
            torch.randperm(k, generator=generator),
            sizes,
            capacities,
            value_range == "shared",
            name="layer.0",
            commensurate=value_range == "commensurate",
        ),
        levels=torch.randint(-high, high, (n, k), generator=generator, dtype=torch.int8),
        scale=torch.rand(n, weight_groups, generator=generator),
        zero=torch.randint(-high, high, (n, weight_groups), generator=generator, dtype=torch.int32),
        bias=torch.randn(n, generator=generator),
        segments=segments_of(sizes, group if weight_groups > 1 else None),
        weight_bits=bits,
    )


def steps_encoder(spec: EncoderSpec) -> SpikeEncoder:
    """The neurons' own encoder, with the capacities of the spec."""
    encoder = SpikeEncoder(
        spec.channel_group,
        steps=(1,) * len(spec.sizes),
        value_range=spec.value_range,
    )
    encoder.capacities = spec.capacities
    return encoder


def assert_encoded_alike(got: Encoding, expected: Encoding) -> None:
    """The same counts and parameters, multiples only where there are some, of the same types."""
    for left, right in zip(got, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def oracle(x: Tensor, spec: LinearSpec) -> Tensor:
    """Centred accumulators in int64, from the counts of `neurons`."""
    encoding = steps_encoder(spec.encoder).encode(x)
    count = encoding.count.long()
    if spec.encoder.order is not None:
        count = count[:, spec.encoder.order]
    sums = []
    for start, stop, act_group, weight_group in spec.segments:
        centred = count[:, start:stop] - encoding.zero_point[:, act_group, None].long()
        level = spec.levels[:, start:stop].long() - spec.zero[:, weight_group, None]
        multiple = 1 if encoding.multiple is None else encoding.multiple[:, act_group, None]
        sums.append(centred @ level.T * multiple)
    return torch.stack(sums)


# Another order of summation in float32, of terms up to a few hundred.
FLOAT_RTOL, FLOAT_ATOL = 1e-5, 1e-3

SHAPES = [
    # n, sizes: one tile, padding everywhere, an empty group, no multiple of anything
    (32, (64,)),
    (1, (1,)),
    (37, (50, 13)),
    (33, (9, 0, 30)),
    (70, (8, 100, 3)),
]
CAPACITIES = [(15, 30, 60), (1, 2, 3), (255, 255, 255), (63, 127, 64), (510, 31, 1000)]


def range_of(capacities: tuple[int, ...], n: int) -> str:
    """A range that the capacities allow."""
    allowed = capacities[-1] == max(capacities) <= 63
    return "commensurate" if allowed and n % 3 else "shared" if n % 2 else "split"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_accumulators_equal_the_int64_oracle(backend: Backend, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for (n, sizes), capacities in itertools.product(SHAPES, CAPACITIES):
        spec = make_spec(
            generator,
            n,
            sizes,
            capacities[: len(sizes)],
            bits,
            weight_groups=1 + (n % 3 if sum(sizes) > 3 else 0),
            value_range=range_of(capacities[: len(sizes)], n),
        )
        x = torch.randn(9, sum(sizes), generator=generator) * 7
        got = backend.accumulate(x, backend.prepare(spec))
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), oracle(x, spec)), (n, sizes, capacities)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "capacity"), [(4, 15), (4, 255), (5, 255), (7, 127), (8, 63)])
@pytest.mark.parametrize("largest", [True, False])
def test_extreme_values_do_not_saturate(
    backend: Backend, bits: int, capacity: int, largest: bool
) -> None:
    n, k, high = 33, 1000, 2 ** (bits - 1)
    level, zero = (high - 1, -high) if largest else (-high, high - 1)
    spec = LinearSpec(
        EncoderSpec(None, (k,), (capacity,)),
        torch.full((n, k), level, dtype=torch.int8),
        torch.ones(n, 1),
        torch.full((n, 1), zero, dtype=torch.int32),
        None,
        segments_of((k,)),
        bits,
    )
    x = torch.ones(5, k)
    expected = k * capacity * (level - zero)
    got = backend.accumulate(x, backend.prepare(spec))
    assert torch.equal(got, torch.full((1, 5, n), expected, dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_longest_8_bit_row_fits_int32(backend: Backend) -> None:
    k = 33_000
    spec = LinearSpec(
        EncoderSpec(None, (k,), (255,)),
        torch.full((1, k), 127, dtype=torch.int8),
        torch.ones(1, 1),
        torch.full((1, 1), -128, dtype=torch.int32),
        None,
        segments_of((k,)),
        8,
    )
    got = backend.accumulate(torch.ones(1, k), backend.prepare(spec))
    assert got.item() == 255 * 255 * k


@needs_compiler
@pytest.mark.parametrize("backend", [NATIVE, PORTABLE], ids=["native", "portable"])
@pytest.mark.parametrize(
    ("bits", "capacities", "weight_groups"),
    [(2, (15, 30), 1), (4, (15, 60), 1), (4, (15, 30), 4), (6, (255, 7), 2), (8, (255, 510), 3)],
)
def test_linear_equals_the_reference_bit_for_bit(
    backend: Backend, bits: int, capacities: tuple[int, ...], weight_groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    ranges = ["split", "shared", *["commensurate"] * (max(capacities) <= 63)]
    for value_range, bias, m in itertools.product(ranges, (True, False), (1, 7, 70)):
        spec = make_spec(generator, 45, (90, 11), capacities, bits, weight_groups, value_range)
        spec = spec if bias else replace(spec, bias=None)
        x = torch.randn(m, 101, generator=generator)
        x[0, :3] = torch.tensor([900.0, -1e-7, 0.0])
        expected = REFERENCE.linear(x, REFERENCE.prepare(spec))
        assert torch.equal(backend.linear(x, backend.prepare(spec)), expected)


def test_reference_linear_is_near_the_float_linear() -> None:
    generator = torch.Generator().manual_seed(1)
    spec = make_spec(generator, bits=8, capacities=(255, 255))
    x = torch.randn(6, 63, generator=generator)
    encoder = steps_encoder(spec.encoder)
    weight = torch.empty(37, 63)
    weight[:, spec.encoder.order] = spec.scale * (spec.levels - spec.zero)
    expected = torch.nn.functional.linear(encoder.decode(encoder.encode(x)), weight, spec.bias)
    got = REFERENCE.linear(x, REFERENCE.prepare(spec))
    torch.testing.assert_close(got, expected, rtol=FLOAT_RTOL, atol=FLOAT_ATOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("capacities", "value_range"),
    [
        *itertools.product([(15, 30), (255, 1), (510, 31)], ["split", "shared"]),
        *itertools.product([(15, 30), (1, 2), (63, 63)], ["commensurate"]),
    ],
)
def test_encode_equals_the_neurons(
    backend: Backend, capacities: tuple[int, ...], value_range: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    spec = make_spec(generator, capacities=capacities, value_range=value_range).encoder
    x = torch.randn(3, 5, 63, generator=generator)
    x[0, 0] = 0.0
    x[0, 1] = x[0, 1].abs()
    x[0, 2] = -x[0, 2].abs()
    assert_encoded_alike(backend.encode(x, spec), steps_encoder(spec).encode(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("commensurate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_ties_and_tiny_ranges_encode_alike(
    backend: Backend, groups: int, commensurate: bool
) -> None:
    sizes = ((8,), (5, 3))[groups - 1]
    spec = EncoderSpec(None, sizes, (15,) * groups, name="ties", commensurate=commensurate)
    ties = torch.arange(8) * 0.5
    x = torch.stack([ties, ties - 1.5, ties * 1e-6, ties * 1e30, -ties])
    x[:, -1] = torch.tensor([7.5, 6.0, 7.5e-6, 7.5e30, -7.5])
    assert_encoded_alike(backend.encode(x, spec), steps_encoder(spec).encode(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_range", ["split", "commensurate"])
def test_as_many_groups_as_there_may_be(backend: Backend, value_range: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, capacities = (2,) * MAX_GROUPS, (15, 30) * (MAX_GROUPS // 2)
    spec = make_spec(generator, sizes=sizes, capacities=capacities, value_range=value_range)
    x = torch.randn(3, 2 * MAX_GROUPS, generator=generator)
    encoding, prepared = backend.encode(x, spec.encoder), backend.prepare(spec)
    got = backend.accumulate_counts(encoding.count, encoding.zero_point, prepared)
    assert torch.equal(in_units(got, encoding.multiple, spec).long(), oracle(x, spec))
    assert torch.equal(backend.accumulate(x, prepared).long(), oracle(x, spec))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 40, 62])
def test_non_finite_input_names_the_layer(backend: Backend, value: float, channel: int) -> None:
    spec = make_spec(torch.Generator().manual_seed(3))
    prepared = backend.prepare(spec)
    x = torch.zeros(6, 63)
    x[4, channel] = value
    for call in (
        lambda: backend.linear(x, prepared),
        lambda: backend.accumulate(x, prepared),
        lambda: backend.encode(x, spec.encoder),
    ):
        with pytest.raises(ValueError, match=r"layer\.0.*NaN or infinity"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_dtypes_and_layouts_of_the_input(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(4)
    spec = make_spec(generator)
    prepared = backend.prepare(spec)
    x = torch.randn(2, 3, 63, generator=generator)
    y = backend.linear(x, prepared)
    assert y.shape == (2, 3, 37)
    assert torch.equal(backend.linear(x[1, 2], prepared), y[1, 2])
    strided = torch.randn(63, 6, generator=generator).t()
    assert torch.equal(
        backend.linear(strided, prepared), backend.linear(strided.clone().contiguous(), prepared)
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = x.to(dtype)
        expected = backend.linear(half.float(), prepared).to(dtype)
        assert torch.equal(backend.linear(half, prepared), expected)
        offset = torch.randn(63, generator=generator)
        expected = backend.linear(half.float() - offset, prepared).to(dtype)
        assert torch.equal(backend.linear(half, prepared, offset), expected)
    leaf = x.clone().requires_grad_()
    assert torch.equal(backend.linear(leaf, prepared).detach(), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_input(backend: Backend) -> None:
    spec = make_spec(torch.Generator().manual_seed(5))
    prepared = backend.prepare(spec)
    assert backend.linear(torch.zeros(2, 0, 63), prepared).shape == (2, 0, 37)
    assert backend.accumulate(torch.zeros(0, 63), prepared).shape == (2, 0, 37)
    assert backend.encode(torch.zeros(0, 63), spec.encoder).count.shape == (0, 63)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 130, 64), (2, 70, 9, 100), (2, 0, 3, 8)])
def test_int_bmm_is_exact(backend: Backend, shape: tuple[int, ...]) -> None:
    batch, m, n, k = shape
    generator = torch.Generator().manual_seed(6)
    a = torch.randint(-128, 128, (batch, m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (batch, n, k), generator=generator, dtype=torch.int8)
    b[0] = -128
    if m:
        a[0] = -128
    got = backend.int_bmm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), a.long() @ b.long().transpose(1, 2))
    swapped = backend.int_bmm(a, b.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(swapped, got)


def test_int_mm_pads_to_what_torch_accepts() -> None:
    generator = torch.Generator().manual_seed(7)
    for m, n, k in [(1, 1, 1), (3, 9, 17), (40, 8, 16)]:
        a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
        b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        b[0] = a[0] = -128
        assert torch.equal(int_mm(a, b).long(), a.long() @ b.long().T)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def lowered_matmuls() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def lowered_backend() -> Iterator[None]:
    """The precision of one backend only, after which torch refuses to tell the precision."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


LOWERED = [
    pytest.param(autocast, id="autocast"),
    pytest.param(lowered_matmuls, id="precision"),
    pytest.param(
        lowered_backend,
        id="backend",
        marks=pytest.mark.skipif(
            not hasattr(torch.backends.mkldnn, "matmul"), reason="needs a newer torch"
        ),
    ),
]


@pytest.mark.parametrize("lowered", LOWERED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_stay_exact_when_torch_lowers_matmuls(
    backend: Backend, lowered: Callable[[], AbstractContextManager[None]]
) -> None:
    generator = torch.Generator().manual_seed(8)
    for capacities in ((15, 30), (510, 1000)):
        spec = make_spec(generator, capacities=capacities, bits=8)
        prepared = backend.prepare(spec)
        x = torch.randn(5, 63, generator=generator)
        a = torch.randint(-128, 128, (2, 3, 70), generator=generator, dtype=torch.int8)
        with lowered():
            accumulators, product = backend.accumulate(x, prepared), backend.int_bmm(a, a)
        assert torch.equal(accumulators.long(), oracle(x, spec))
        assert torch.equal(product.long(), a.long() @ a.long().mT)


@pytest.mark.parametrize("lowered", [nullcontext, *LOWERED])
@pytest.mark.parametrize("largest", [1, 255, 4000])
def test_exact_matmul(lowered: Callable[[], AbstractContextManager[None]], largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-largest, largest + 1, (3, 4, 65), generator=generator)
    b = torch.randint(-largest, largest + 1, (3, 65, 6), generator=generator)
    a[0, 0], b[0, :, 0] = largest, largest
    with lowered():
        product = exact_matmul(a, b, largest**2 * 65)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a @ b)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads: int) -> None:
    generator = torch.Generator().manual_seed(9)
    spec = make_spec(generator, 200, (180, 20))
    x = torch.randn(150, 200, generator=generator)
    expected = REFERENCE.linear(x, REFERENCE.prepare(spec))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(NATIVE.linear(x, NATIVE.prepare(spec)), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_compiled_graphs_hold_the_native_operator() -> None:
    spec = make_spec(torch.Generator().manual_seed(10))
    prepared = NATIVE.prepare(spec)
    x = torch.randn(4, 63)
    compiled = torch.compile(
        lambda value: NATIVE.linear(value, prepared) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x), NATIVE.linear(x, prepared) * 2)
    torch.library.opcheck(
        native_module.native_linear,
        (x, prepared.descriptor, 37, "layer.0"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_are_refused(backend: Backend) -> None:
    prepared = backend.prepare(make_spec(torch.Generator().manual_seed(11)))
    with pytest.raises(ValueError, match=r"expected an input of 63 channels, got \(2, 62\)"):
        backend.linear(torch.zeros(2, 62), prepared)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        backend.linear(torch.zeros(2, 63, dtype=torch.int64), prepared)
    with pytest.raises(TypeError, match="two int8 tensors"):
        backend.int_bmm(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"a \[B, M, K\]"):
        backend.int_bmm(torch.zeros(1, 2, 3).to(torch.int8), torch.zeros(1, 2, 4).to(torch.int8))
    other = NATIVE if isinstance(backend, ReferenceBackend) else REFERENCE
    with pytest.raises(TypeError, match="prepared by another backend"):
        other.linear(torch.zeros(2, 63), prepared)


def test_native_refuses_other_devices() -> None:
    spec = make_spec(torch.Generator().manual_seed(12))
    with pytest.raises(ValueError, match="runs on the CPU"):
        NATIVE.prepare(replace_unchecked(spec, levels=spec.levels.to("meta")))
    if REASON is None:
        prepared = NATIVE.prepare(spec)
        with pytest.raises(ValueError, match="the input is on meta"):
            NATIVE.linear(torch.zeros(2, 63, device="meta"), prepared)
        a = torch.zeros(1, 2, 3, dtype=torch.int8)
        with pytest.raises(ValueError, match="expected CPU tensors"):
            NATIVE.int_bmm(a, a.to("meta"))


def replace_unchecked(spec: LinearSpec, levels: Tensor) -> LinearSpec:
    """A copy with other levels, without validation (meta tensors hold no values)."""
    copy = object.__new__(LinearSpec)
    copy.__dict__.update(spec.__dict__, levels=levels)
    return copy


# -- specifications --------------------------------------------------------------------------------


def test_segments_are_the_maximal_runs() -> None:
    assert segments_of((3, 0, 2)) == (Segment(0, 3, 0, 0), Segment(3, 5, 2, 0))
    group = torch.tensor([0, 0, 1, 1, 1])
    expected = (Segment(0, 2, 0, 0), Segment(2, 3, 0, 1), Segment(3, 5, 2, 1))
    assert segments_of((3, 0, 2), group) == expected
    assert segments_of((0,)) == ()
    with pytest.raises(ValueError, match="one weight group per encoded position"):
        segments_of((3,), group)


def test_channel_group_is_in_original_order() -> None:
    spec = EncoderSpec(torch.tensor([2, 0, 1]), (2, 1), (15, 30))
    assert spec.channel_group.tolist() == [0, 1, 0]
    assert EncoderSpec(None, (2, 1), (15, 30)).channel_group.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, (), ()), "at least one|one or more groups"),
        ((None, (3,), (15, 30)), "size and a capacity"),
        ((None, (-1, 2), (15, 30)), "must be >= 0"),
        ((None, (0,), (15,)), "hold a channel"),
        ((None, (1,) * 65, (15,) * 65), "at most 64 channel groups, got 65"),
        ((None, (3,), (0,)), r"must be in 1\.\.32767"),
        ((None, (3,), (40_000,)), "fewer steps or bits"),
        ((torch.tensor([0, 1, 1]), (3,), (15,)), "permutation of the 3 channels"),
        ((torch.tensor([0, 1]), (3,), (15,)), "permutation of the 3 channels"),
    ],
)
def test_encoder_spec_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderSpec(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": torch.zeros(4, 6)}, "levels must be int8"),
        ({"levels": torch.zeros(4, 5, dtype=torch.int8)}, "5 channels, the encoder 6"),
        ({"levels": torch.full((4, 6), 8, dtype=torch.int8)}, r"must be in -8\.\.7 for 4 bits"),
        ({"scale": torch.zeros(4, 1).double()}, "float32 scale and int32 zero"),
        ({"scale": torch.zeros(4, 2)}, r"must both be \[N=4, J\]"),
        ({"zero": torch.full((4, 1), 40_000, dtype=torch.int32)}, "zero points must be in"),
        ({"bias": torch.zeros(5)}, r"bias must be float32 \[4\]"),
        ({"weight_bits": 9}, r"weight_bits must be 1\.\.8"),
        ({"segments": (Segment(0, 6, 0, 0),)}, "does not continue at 0"),
        ({"segments": (Segment(0, 4, 0, 1), Segment(4, 6, 1, 0))}, "build segments with"),
        ({"segments": (Segment(0, 4, 0, 0),)}, "cover 4 of 6"),
    ],
)
def test_linear_spec_refuses(change: dict[str, object], message: str) -> None:
    spec = make_spec(torch.Generator().manual_seed(13), 4, (4, 2))
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)  # type: ignore[arg-type]


def test_linear_spec_refuses_an_int32_overflow() -> None:
    k = 40_000
    with pytest.raises(ValueError, match="beyond int32"):
        LinearSpec(
            EncoderSpec(None, (k,), (255,)),
            torch.full((1, k), 127, dtype=torch.int8),
            torch.ones(1, 1),
            torch.full((1, 1), -128, dtype=torch.int32),
            None,
            segments_of((k,)),
            8,
        )


# -- choice of the backend and the compiler --------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library loaded yet, and an empty cache; restored afterwards."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(native_module, "library", native_module.library.__wrapped__)
    monkeypatch.setattr(kernels, "_native", NativeBackend)
    monkeypatch.setattr(kernels, "_choose", kernels._choose.__wrapped__)
    return tmp_path


@pytest.mark.usefixtures("fresh")
def test_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no C compiler found.*install a C compiler"):
        get_backend("native")
    with caplog.at_level(logging.WARNING, logger="snnllm.kernels"):
        assert get_backend("auto").name == "reference"
    assert "no C compiler found" in caplog.text


@pytest.mark.usefixtures("fresh")
def test_failing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: "/bin/cc")

    def fail(command: list[str], **options: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=int("-dM" not in command), stdout="", stderr="no stdint")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="cannot compile the kernels: no stdint"):
        get_backend("native")


def test_compiler_that_does_not_run(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: str(fresh))
    with pytest.raises(compiler.CompilerError, match="does not run"):
        compiler.build()


@needs_compiler
@pytest.mark.parametrize("words", ["{gcc} -DSNN_OPTION", "env {gcc}", "'{gcc}' -DA='1 2'"])
def test_cc_may_hold_a_wrapper_and_options(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    gcc = compiler.find_compiler()[0]
    monkeypatch.setenv("CC", words.format(gcc=gcc))
    assert len(compiler.find_compiler()) == 2
    assert compiler.build().parent == fresh


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_such_compiler -m64", r"looked for no_such_compiler\)"),
        ("'gcc", 'CC="\'gcc" is no command: No closing quotation'),
    ],
)
def test_cc_that_is_no_compiler(monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.setenv("CC", words)
    with pytest.raises(compiler.CompilerError, match=message):
        compiler.find_compiler()


@needs_compiler
def test_cache_is_reused_and_must_be_writable(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.build()
    stamp = first.stat().st_mtime_ns
    assert compiler.build() == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in fresh.iterdir()] == [first.name]
    blocked = fresh / "file"
    blocked.touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked))
    with pytest.raises(compiler.CompilerError, match="is not writable"):
        compiler.build()
    with pytest.raises(compiler.CompilerError, match="cannot be loaded"):
        compiler.load(blocked)


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "snnllm"


def test_get_backend() -> None:
    assert get_backend("reference").name == "reference"
    missing = TritonBackend().available()
    assert get_backend("auto", "cuda").name == ("triton" if missing is None else "reference")
    assert get_backend().name == ("native" if REASON is None else "reference")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        get_backend("fast")
    with pytest.raises(RuntimeError, match="runs on cpu, not on cuda"):
        get_backend("native", "cuda")


# -- commensurate thresholds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_commensurate_rows_that_are_not_finite_name_the_layer(
    backend: Backend, value: float
) -> None:
    spec = make_spec(torch.Generator().manual_seed(3), value_range="commensurate")
    x = torch.zeros(6, 63)
    x[4, 40], x[4, 41] = value, -value
    with pytest.raises(ValueError, match=r"layer\.0.*NaN or infinity"):
        backend.linear(x, backend.prepare(spec))


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_counts_have_no_unit(backend: Backend) -> None:
    spec = make_spec(torch.Generator().manual_seed(4), value_range="commensurate")
    x = torch.randn(9, 63, generator=torch.Generator().manual_seed(5)) * 4
    prepared, encoding = backend.prepare(spec), backend.encode(x, spec.encoder)
    sums = backend.accumulate_counts(encoding.count, encoding.zero_point, prepared)
    assert not torch.equal(sums, backend.accumulate(x, prepared))
    assert torch.equal(in_units(sums, encoding.multiple, spec), backend.accumulate(x, prepared))


def test_a_merged_sum_is_one_product() -> None:
    spec = make_spec(torch.Generator().manual_seed(6), value_range="commensurate")
    assert spec.merged
    one = make_spec(torch.Generator().manual_seed(6), sizes=(63,), capacities=(15,))
    assert not replace(one, encoder=replace(one.encoder, commensurate=True)).merged
    x = torch.randn(5, 63, generator=torch.Generator().manual_seed(7))
    encoding = REFERENCE.encode(x, spec.encoder)
    group = spec.encoder.channel_group.long()
    multiple, zero = encoding.multiple[:, group], encoding.zero_point[:, group]
    charge = (encoding.count * multiple).long()
    assert charge.max() <= 255
    order = spec.encoder.order
    centred = (charge - zero * multiple)[:, order]
    sums = REFERENCE.accumulate(x, REFERENCE.prepare(spec)).sum(0)
    assert torch.equal(sums, centred @ (spec.levels.long() - spec.zero).T)


def test_commensurate_encoders_are_checked() -> None:
    with pytest.raises(ValueError, match="shared and commensurate exclude each other"):
        EncoderSpec(None, (4, 4), (15, 30), True, commensurate=True)
    with pytest.raises(ValueError, match="up_proj: .* capacities of at most 63"):
        EncoderSpec(None, (4, 4), (15, 64), name="up_proj", commensurate=True)
    with pytest.raises(ValueError, match="the largest capacity in the last"):
        EncoderSpec(None, (4, 4), (30, 15), commensurate=True)
    split, ours = (EncoderSpec(None, (4, 4), (15, 30), commensurate=c) for c in (False, True))
    assert not split.is_like(ours)
    assert [split.range_mode, ours.range_mode] == [0, 2]
    assert EncoderSpec(None, (4, 4), (15, 30), True).range_mode == 1


def test_charges_count_in_the_overflow_check() -> None:
    """15 and 30 would fit where units up to 255 do not; merged, the sum over all channels counts."""
    k = 40_000
    for commensurate in (False, True):
        fields = {
            "levels": torch.full((1, k), 127, dtype=torch.int8),
            "scale": torch.ones(1, 1),
            "zero": torch.full((1, 1), -128, dtype=torch.int32),
            "segments": segments_of((k // 2, k // 2)),
        }
        encoder = EncoderSpec(None, (k // 2, k // 2), (15, 30), commensurate=commensurate)
        reason = pytest.raises(ValueError, match="over 40000 channels can reach .*, beyond int32")
        with reason if commensurate else nullcontext():
            LinearSpec(encoder=encoder, bias=None, weight_bits=8, **fields)
