"""Collapsed linears in Triton give the integers and outputs of the reference, bit for bit.

Without a GPU the kernels run in Triton's interpreter, so the sizes are small.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snnllm.kernels import EncoderSpec, LinearSpec, ReferenceBackend, segments_of
from snnllm.kernels.triton.backend import (
    BLOCK,
    TritonBackend,
    TritonLinear,
    encode_plan,
    multiply,
    pack_blocks,
)

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from snnllm.kernels.triton import linear as triton_linear  # noqa: E402

REASON = TritonBackend().available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton kernels: {REASON}")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter truncates to bfloat16, where devices round.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CONFIGS = [(0, 8, 64, 4), (16, 32, 4, 2, 0), (32, 16, 4, 2, 0)]


def make_spec(
    seed: int,
    n: int = 12,
    sizes: tuple[int, ...] = (150, 13),
    capacities: tuple[int, ...] = (15, 30),
    bits: int = 4,
    weight_groups: int = 1,
    shared: bool = False,
    bias: bool = True,
    commensurate: bool = False,
) -> LinearSpec:
    generator = torch.Generator().manual_seed(seed)
    k, high = sum(sizes), 2 ** (bits - 1)
    group = torch.arange(k) * weight_groups // k
    spec = LinearSpec(
        encoder=EncoderSpec(
            *(torch.randperm(k, generator=generator), sizes, capacities, shared, "layer"),
            commensurate=commensurate,
        ),
        levels=torch.randint(-high, high, (n, k), generator=generator).to(torch.int8),
        scale=torch.rand(n, weight_groups, generator=generator) + 0.1,
        zero=torch.randint(-high, high, (n, weight_groups), generator=generator).int(),
        bias=torch.randn(n, generator=generator) if bias else None,
        segments=segments_of(sizes, group),
        weight_bits=bits,
    )
    moved = {
        name: None if value is None else value.to(DEVICE)
        for name, value in (
            ("levels", spec.levels),
            ("scale", spec.scale),
            ("zero", spec.zero),
            ("bias", spec.bias),
        )
    }
    return LinearSpec(encoder=spec.encoder, segments=spec.segments, weight_bits=bits, **moved)


def rows(seed: int, m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3
    x[:, :2] *= 30
    return x.to(DEVICE, dtype)


def check(spec: LinearSpec, x: Tensor) -> None:
    """Accumulators, outputs, and both with an offset and with a residual."""
    reference, backend = ReferenceBackend(), TritonBackend()
    expected = reference.prepare(spec)
    prepared = backend.prepare(spec)
    assert torch.equal(backend.accumulate(x, prepared), reference.accumulate(x, expected))
    y = reference.linear(x, expected)
    assert torch.equal(backend.linear(x, prepared), y)
    generator = torch.Generator().manual_seed(len(x))
    offset = torch.randn(spec.in_features, generator=generator).to(DEVICE)
    # What a linear made of it before the encoder took the offset: float32 in, float32 out, rounded.
    less = reference.linear(x.float() - offset, expected).to(x.dtype)
    assert torch.equal(backend.linear(x, prepared, offset), less)
    residual = (torch.randn(y.shape, generator=generator) * 30).to(DEVICE, y.dtype)
    encoded = encode_plan(x, prepared.plan, offset)
    assert torch.equal(multiply(encoded, prepared, x.dtype, residual), residual + less)


@pytest.fixture(params=CONFIGS, ids=["dp4a", "16x32", "32x16"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    chosen: tuple[int, ...] = request.param
    monkeypatch.setattr("snnllm.kernels.triton.operators.choose_config", lambda *_: chosen)
    return chosen


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.usefixtures("config")
def test_weight_widths(bits: int) -> None:
    check(make_spec(bits, bits=bits), rows(0, 3, 163))


@pytest.mark.parametrize(
    ("sizes", "capacities"),
    [
        ((163,), (15,)),
        ((150, 13), (15, 60)),
        ((100, 50, 13), (15, 30, 45)),
        ((130, 33), (127, 255)),
    ],
)
@pytest.mark.usefixtures("config")
def test_groups_and_capacities(sizes: tuple[int, ...], capacities: tuple[int, ...]) -> None:
    check(make_spec(1, sizes=sizes, capacities=capacities), rows(1, 3, 163))


@pytest.mark.parametrize("weight_groups", [2, 5])
@pytest.mark.usefixtures("config")
def test_weight_groups(weight_groups: int) -> None:
    check(make_spec(2, weight_groups=weight_groups), rows(2, 3, 163))


@given(
    seed=st.integers(0, 2**20),
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    low=st.integers(1, 200),
    high=st.integers(0, 40),
    bits=st.sampled_from([2, 4, 8]),
    shared=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60 if DEVICE == "cuda" else 4, deadline=None)
def test_any_linear(
    seed: int,
    m: int,
    n: int,
    low: int,
    high: int,
    bits: int,
    shared: bool,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    sizes, capacities = ((low, high), (15, 30)) if high else ((low,), (15,))
    spec = make_spec(seed, n, sizes, capacities, bits, shared=shared, bias=bias)
    check(spec, rows(seed, m, low + high, dtype))


@pytest.mark.parametrize(
    ("m", "groups", "weight_groups"),
    [(1, 2, 1), (3, 2, 1), (17, 2, 1), (40, 2, 1), (3, 3, 1), (17, 3, 1), (1, 3, 2), (17, 2, 2)],
)
def test_commensurate_thresholds(m: int, groups: int, weight_groups: int) -> None:
    sizes, capacities = ((150, 13), (15, 30)) if groups == 2 else ((100, 50, 13), (15, 30, 60))
    spec = make_spec(
        *(m, 20, sizes, capacities), weight_groups=weight_groups, commensurate=True, bias=m != 3
    )
    assert spec.merged == (weight_groups == 1)
    check(spec, rows(m, m, 163))


def test_one_group_is_commensurate_with_itself() -> None:
    one: dict[str, Any] = {"sizes": (163,), "capacities": (15,)}
    for weight_groups in (1, 2):
        spec = make_spec(5, **one, weight_groups=weight_groups, commensurate=True)
        check(spec, rows(5, 3, 163))
        split = make_spec(5, **one, weight_groups=weight_groups)
        mine, theirs = (
            TritonBackend().linear(rows(5, 3, 163), TritonBackend().prepare(s))
            for s in (spec, split)
        )
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("bits", "capacities"), [(2, (15, 15)), (8, (63, 63)), (4, (1, 2))])
@pytest.mark.usefixtures("config")
def test_merged_sums(bits: int, capacities: tuple[int, ...]) -> None:
    spec = make_spec(bits, capacities=capacities, bits=bits, commensurate=True)
    check(spec, rows(4, 3, 163, DTYPES[-1]))


@pytest.mark.parametrize("commensurate", [False, True])
def test_counts_of_a_step(commensurate: bool) -> None:
    spec, backend = make_spec(3, commensurate=commensurate), TritonBackend()
    reference = ReferenceBackend()
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(0, 16, (5, 163), generator=generator).to(DEVICE, torch.uint8)
    zero_point = torch.randint(0, 15, (5, 2), generator=generator).int().to(DEVICE)
    for active in (1, 2, 3):
        ours, theirs = (
            b.accumulate_counts(count, zero_point, b.prepare(spec), active)
            for b in (backend, reference)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value_range", ["split", "shared", "commensurate"])
@pytest.mark.parametrize(
    ("sizes", "capacities"),
    [((20,), (15,)), ((16, 4), (15, 510)), ((1,) * 20, tuple(range(11, 31)))],
    ids=["one", "wide", "many"],
)
def test_counts_in_the_original_order(
    sizes: tuple[int, ...], capacities: tuple[int, ...], value_range: str
) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shared, commensurate = value_range == "shared", value_range == "commensurate"
    if commensurate:
        capacities = tuple(min(capacity, 60) for capacity in capacities)
    spec = EncoderSpec(order, sizes, capacities, shared, "layer", commensurate=commensurate)
    x = rows(5, 6, 20).view(2, 3, 20)
    ours, theirs = TritonBackend().encode(x, spec), ReferenceBackend().encode(x, spec)
    for mine, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert mine is None
            continue
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


def test_packed_blocks_hold_planes_of_positions() -> None:
    codes = torch.arange(2 * BLOCK, dtype=torch.int16).view(1, -1) % 16
    packed = pack_blocks(codes, 4)
    assert packed.shape == (1, BLOCK)
    assert torch.equal(packed[0, :64] & 15, codes[0, :64].to(torch.uint8))
    assert torch.equal(packed[0, 64:] >> 4, codes[0, 192:].to(torch.uint8))


def test_a_weight_takes_its_bits_of_memory() -> None:
    prepared = TritonBackend().prepare(make_spec(0, n=64, sizes=(1024,), capacities=(15,)))
    assert isinstance(prepared, TritonLinear)
    weight = prepared.arguments[0]
    assert weight is not None
    assert weight.numel() == 64 * 1024 // 2


def test_refusals() -> None:
    backend = TritonBackend()
    spec = make_spec(0, capacities=(15, 510))
    wide = backend.prepare(spec)
    with pytest.raises(ValueError, match="beyond 255"):
        backend.linear(rows(0, 1, 163), wide)
    with pytest.raises(ValueError, match="beyond 255"):
        backend.accumulate(rows(0, 1, 163), wide)
    zero_point = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="beyond 255"):
        backend.accumulate_counts(rows(0, 1, 163).to(torch.int16), zero_point, wide)
    with pytest.raises(TypeError, match="prepared by another backend"):
        backend.linear(rows(0, 1, 163), ReferenceBackend().prepare(make_spec(0)))


@pytest.mark.parametrize("wrong", ["shape", "dtype", "strides", "accumulators"])
def test_a_residual_must_be_like_the_outputs(wrong: str) -> None:
    x, layer = rows(0, 3, 163), TritonBackend().prepare(make_spec(0))
    dtype = torch.int32 if wrong == "accumulators" else torch.float32
    shape = {"shape": (3, 11), "accumulators": (2, 3, 12)}.get(wrong, (3, 12))
    residual = torch.zeros(shape, dtype=torch.float64 if wrong == "dtype" else dtype, device=DEVICE)
    if wrong == "strides":
        residual = residual.T.contiguous().T
    with pytest.raises(ValueError, match="contiguous and like the outputs"):
        multiply(encode_plan(x, layer.plan), layer, dtype, residual)


@pytest.mark.parametrize("offset", [False, True])
def test_inputs_in_other_dtypes_and_layouts(offset: bool) -> None:
    spec, backend, reference = make_spec(0), TritonBackend(), ReferenceBackend()
    off = (
        torch.randn(163, generator=torch.Generator().manual_seed(0)).to(DEVICE) if offset else None
    )
    x = rows(0, 6, 163).double()
    every_second = torch.stack((x, x), -1).half()[..., 0].view(2, 3, 163)
    for inputs in (x, x.float().T.contiguous().T, every_second):
        ours, theirs = (b.linear(inputs, b.prepare(spec), off) for b in (backend, reference))
        assert ours.dtype == inputs.dtype
        assert torch.equal(ours, theirs)
    ours, theirs = (b.accumulate(x, b.prepare(spec)) for b in (backend, reference))
    assert torch.equal(ours, theirs)


def test_steps_of_spikes_fit_where_their_counts_do_not() -> None:
    """A8 and T = 2: up to 510 in a count, up to 255 in a step."""
    spec = make_spec(0, capacities=(255, 510))
    spikes = torch.randint(0, 256, (3, 163), dtype=torch.uint8).to(DEVICE)
    zero_point = torch.tensor([[3, 5], [0, 0], [255, 510]], dtype=torch.int32, device=DEVICE)
    ours, reference = (
        b.accumulate_counts(spikes, zero_point, b.prepare(spec))
        for b in (TritonBackend(), ReferenceBackend())
    )
    assert torch.equal(ours, reference)


def test_the_kernels_know_the_block_of_the_packing() -> None:
    assert triton_linear.BLOCK == BLOCK


def test_the_compiler_knows_the_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec, backend = make_spec(0), TritonBackend()
    prepared = backend.prepare(spec)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(rows(0, 3, 163))
        assert backend.linear(x, prepared).shape == (3, 12)
        assert backend.accumulate(x, prepared).shape == (2, 3, 12)
