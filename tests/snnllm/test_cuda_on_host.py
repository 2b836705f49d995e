"""The CUDA C++ kernels on the CPU: their bodies, compiled by the C++ compiler with imitated instructions."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snnllm.kernels import EncoderSpec, LinearSpec, ReferenceBackend, segments_of

pytest.importorskip("triton", reason="the package triton is not installed")
from snnllm.attention import SpikingLlamaAttention, spiking_attention
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.attention.rotation import mixing_of
from snnllm.kernels.attention.store import store_heads
from snnllm.kernels.cuda import attention as cuda_attention
from snnllm.kernels.cuda import attention_source as cuda_attention_source
from snnllm.kernels.cuda import encode as cuda_encode
from snnllm.kernels.cuda import encode_source as cuda_encode_source
from snnllm.kernels.cuda import gated_source as cuda_gated_source
from snnllm.kernels.cuda import normed_source as cuda_normed_source
from snnllm.kernels.cuda import rows_source as cuda_rows_source
from snnllm.kernels.cuda import tiles_source as cuda_tiles_source
from snnllm.kernels.cuda.driver import Launch
from snnllm.kernels.cuda.primitives import OUTPUTS, PREAMBLE, SHARED
from snnllm.kernels.triton.backend import TritonBackend, TritonLinear, encode_plan
from snnllm.kernels.triton.swiglu import silu_mul_encode
from snnllm.norm import rms_norm
from tests.snnllm.random_attention import kernels_of, random_attention

FLAGS = ("-std=c++17", "-O2", "-w", "-ffp-contract=off", "-shared", "-fPIC")
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter"),
]
ENTRY = {
    "rows": r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n) {
  Map boxes;
  *(HostMap*)&boxes = {(const unsigned char*)p[1], n[1], n[2] / 2, 16 * STRIPS, 64};
  run(blocks, threads, [&] {
    linear_rows((const unsigned char*)p[0], (const unsigned char*)p[1], boxes, (const float*)p[2],
                (const int*)p[3], (const int*)p[4], (const int*)p[5], (const float*)p[6],
                (const int*)p[7], (const int*)p[8], (const float*)p[9], p[10], p[11],
                n[0], n[1], n[2], n[3], n[4]);
  });
}
""",
    "tiles": r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n) {
  Map counts, weights, outputs;
  *(HostMap*)&counts = {(const unsigned char*)p[0], n[0], n[2], BM, 128};
  *(HostMap*)&weights = {(const unsigned char*)p[1], n[1], n[2] / 2, BN, 64};
  *(HostMap*)&outputs = {(const unsigned char*)p[11], n[0], 2 * n[1], 16, BN / WORKERS / 2};
  run(blocks, threads, [&] {
    linear_tiles(counts, weights, outputs, (const float*)p[2], (const int*)p[3], (const int*)p[4],
                 (const int*)p[5], (const float*)p[6], (const int*)p[7], (const int*)p[8],
                 (const float*)p[9], p[10], p[11], n[0], n[1], n[2], n[3], n[4], 2, 0,
                 (n[0] + BM - 1) / BM * ((n[1] + BN * SPLIT - 1) / (BN * SPLIT)) * SPLIT);
  });
}
""",
    "gated": r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n, const float*) {
  auto kernel = [&] {
    encode_gated(p[0], p[1], (const float*)p[2], (const float*)p[3], (const float*)p[4], (unsigned char*)p[5],
                 (float*)p[6], (int*)p[7], (int*)p[8], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8],
                 n[9], n[10], n[11]);
  };
  run(blocks, threads, kernel, CLUSTER);
}
""",
    "normed": r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n, const float* f) {
  run(blocks, threads, [&] {
    encode_normed(p[0], p[1], p[2], (const float*)p[3], (const float*)p[4], (const float*)p[5], p[6],
                  (unsigned char*)p[7], (float*)p[8], (int*)p[9], (int*)p[10], f[0], n[0], n[1]);
  });
}
""",
    "attention": r"""
extern "C" void launch(int blocks, int threads, void** p, const int* n, const float* f) {
  auto kernel = [&] {
    attend_one(p[0], (unsigned char*)p[1], (unsigned char*)p[2], (const int*)p[3], (const int*)p[4],
               (const float*)p[5], (const float*)p[6], p[7], p[8], p[9], p[10], (const unsigned char*)p[11],
               (const float*)p[12], (const float*)p[13], (const float*)p[14], (const float*)p[15],
               (const i64*)p[16], (i64*)p[17], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9],
               n[10], n[11], n[12], f[0], f[1]);
  };
  run(blocks, threads, kernel, CLUSTER);
}
""",
}
BODIES = {
    "rows": cuda_rows_source.BODY,
    "gated": cuda_encode_source.ENCODING + cuda_gated_source.BODY,
    "normed": cuda_encode_source.ENCODING + cuda_encode_source.LAYOUT + cuda_normed_source.BODY,
    "tiles": cuda_tiles_source.BODY,
    "attention": cuda_attention_source.BODY,
}


def compiler_for(
    folder: Path, bodies: dict[str, str], entries: dict[str, str]
) -> Callable[[str, dict[str, int]], Any]:
    """What compiles a kernel with macros for the CPU, once for all that ask, and returns its library."""
    header = Path(__file__).with_name("cuda_on_host.h").read_text()

    def compiled(name: str, macros: dict[str, int]) -> Any:
        stem = "_".join([name, *(str(value) for value in macros.values())])
        library = folder / f"{stem}.so"
        if not library.exists():
            source = folder / f"{stem}.cpp"
            source.write_text(
                "#define __align__(n) __attribute__((aligned(n)))\n"
                + PREAMBLE
                + header
                + SHARED
                + f"#define {'unaligned' if name == 'tiles' else 'memory'} SHARED_MEMORY\n"
                + bodies[name].replace("extern __shared__", "//")
                + entries[name]
            )
            flags = [f"-D{key}={value}" for key, value in macros.items()]
            assert COMPILER is not None
            subprocess.run([COMPILER, *FLAGS, *flags, "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))

    return compiled


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, int]], Any]:
    """Compile a kernel with macros for the CPU."""
    return compiler_for(tmp_path_factory.mktemp("cuda"), BODIES, ENTRY)


def launched(build: Any, name: str, planned: Launch, late: tuple[Tensor, ...] = ()) -> None:
    """Run a planned launch: pointers, integers and floats of a kernel come in arrays of their own.

    What comes late is there when the kernel has waited for the one in front; before that it is NaN, or -1.
    """
    tensors = [x for x in planned.arguments if x is None or isinstance(x, Tensor)]
    integers = [x for x in planned.arguments if isinstance(x, int)]
    floats = [x for x in planned.arguments if isinstance(x, float)]
    library = build(name, planned.macros)
    kept = []
    for storage in {x.untyped_storage().data_ptr(): x.untyped_storage() for x in late}.values():
        bytes_of = torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        kept.append(bytes_of.clone())
        bytes_of.fill_(255)
        library.arrives_late(
            *map(ctypes.c_void_p, (bytes_of.data_ptr(), kept[-1].data_ptr())),
            ctypes.c_longlong(len(bytes_of)),
        )
    library.launch(
        planned.blocks,
        planned.threads,
        (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_int * len(integers))(*integers),
        (ctypes.c_float * len(floats))(*floats),
    )


def spec_of(
    n: int,
    sizes: tuple[int, ...],
    capacities: tuple[int, ...],
    bias: bool,
    commensurate: bool = False,
) -> LinearSpec:
    generator = torch.Generator().manual_seed(n)
    k = sum(sizes)
    return LinearSpec(
        encoder=EncoderSpec(
            torch.randperm(k, generator=generator),
            *(sizes, capacities),
            name="layer",
            commensurate=commensurate,
        ),
        levels=torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8),
        scale=torch.rand(n, 1, generator=generator) + 0.1,
        zero=torch.randint(-8, 8, (n, 1), generator=generator).int(),
        bias=torch.randn(n, generator=generator) if bias else None,
        segments=segments_of(sizes),
        weight_bits=4,
    )


def run(
    build: Any,
    name: str,
    shape: dict[str, int],
    x: Tensor,
    spec: LinearSpec,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """Outputs of a kernel, plus a residual if one is given, or its accumulators (int32)."""
    layer = TritonBackend().prepare(spec)
    assert isinstance(layer, TritonLinear)
    count, threshold, zero_point, count_sum = encode_plan(x, layer.plan)
    weight, segments, scale, zero, row_sum, _, bias = layer.arguments
    m, n, s = len(x), spec.out_features, len(segments)
    size = (s, m, n) if dtype == torch.int32 else (m, n)
    out = torch.full(size, 77, dtype=dtype)
    macros = {
        **shape,
        "SEGMENTS": s,
        "MERGED": int(spec.merged and dtype != torch.int32),
        "BIAS": int(bias is not None),
        "RESIDUAL": int(residual is not None),
        "JOINT": int(scale.shape[1] == 1),
        "OUT": OUTPUTS[dtype],
    }
    tensors = [count, weight, threshold, zero_point, count_sum]
    tensors += [segments, scale, zero, row_sum, bias, residual, out]
    pointers = (ctypes.c_void_p * 12)(*(None if t is None else t.data_ptr() for t in tensors))
    numbers = (ctypes.c_int * 5)(m, n, count.shape[1], threshold.shape[1], scale.shape[1])
    if name == "rows":
        blocks, threads = -(-n // (16 * shape["STRIPS"])), cuda_rows_source.ROW_THREADS
    else:
        # More tiles than blocks.
        blocks, threads = (
            1 if shape["BN"] == 256 else 2,
            128 + 128 * shape["WORKERS"],
        )
    build(name, macros).launch(blocks, threads, pointers, numbers)
    return out


CASES = [
    ((300,), (15,), torch.bfloat16, False),
    ((130, 33), (15, 30), torch.float32, False),
    ((256, 128), (15, 30), torch.bfloat16, False),  # whole blocks
    ((700, 150), (127, 255), torch.int32, False),
    ((700, 150), (15, 30), torch.bfloat16, True),
    ((130, 33), (15, 60), torch.int32, True),
    ((100, 30), (15, 30), torch.bfloat16, False),  # a block each
]
ROWS = [
    (1, {"ROWS8": 1, "STRIPS": 2, "STAGES": 2, "RESIDENT": 1}),
    (1, {"ROWS8": 1, "STRIPS": 4, "STAGES": 2, "RESIDENT": 2}),
    (13, {"ROWS8": 2, "STRIPS": 2, "STAGES": 4, "RESIDENT": 1}),
    (32, {"ROWS8": 4, "STRIPS": 1, "STAGES": 2, "RESIDENT": 1}),
]
TILES = [
    (70, {"BM": 64, "BN": 128, "WORKERS": 2, "STAGES": 3, "KEPT": 32, "SPLIT": 2}),
    (130, {"BM": 128, "BN": 192, "WORKERS": 3, "STAGES": 2, "KEPT": 0, "SPLIT": 1}),
    (20, {"BM": 128, "BN": 256, "WORKERS": 2, "STAGES": 4, "KEPT": 52, "SPLIT": 1}),
    (140, {"BM": 128, "BN": 64, "WORKERS": 1, "STAGES": 3, "KEPT": 32, "SPLIT": 1}),
]


SHAPES = [*(("rows", *case) for case in ROWS), *(("tiles", *case) for case in TILES)]
SHAPE_NAMES = ["rows1", "wide1", "rows13", "rows32", "tiles64", "tiles192", "tiles256", "narrow"]


def everywhere(cases: list[Any], names: list[str], **quick: str) -> Any:
    """Every case on every shape; of those that take half a minute each, the quick tests run the one that is named."""
    pairs = itertools.product(zip(SHAPE_NAMES, SHAPES, strict=True), zip(names, cases, strict=True))
    return pytest.mark.parametrize(
        ("shape", "case"),
        [
            pytest.param(
                shape,
                case,
                id=f"{where}-{name}",
                marks=[pytest.mark.slow] * (name != quick.get(where, name)),
            )
            for (where, shape), (name, case) in pairs
        ],
    )


@everywhere(
    CASES,
    ["one", "two", "whole", "large", "commensurate", "charges", "short"],
    tiles64="short",
    tiles192="two",
    narrow="commensurate",
)
def test_kernels_have_the_integers_and_outputs_of_the_reference(
    build: Any, shape: Any, case: Any
) -> None:
    name, rows, macros = shape
    sizes, capacities, dtype, commensurate = case
    n = 40 if name == "rows" else 264
    spec = spec_of(n, sizes, capacities, dtype != torch.bfloat16, commensurate)
    x = torch.randn(rows, sum(sizes), generator=torch.Generator().manual_seed(rows)) * 3
    x[:, :2] *= 30
    reference = ReferenceBackend()
    prepared = reference.prepare(spec)
    expected = (
        reference.accumulate(x, prepared)
        if dtype == torch.int32
        else reference.linear(x, prepared).to(dtype)
    )
    assert torch.equal(run(build, name, macros, x, spec, dtype), expected)


def with_random_groups(
    heads: int, kv_heads: int, dim: int, spike: dict[str, Any], seed: int
) -> tuple[SpikingLlamaAttention, torch.Generator]:
    """Attention with as many salient channels as it says, a tenth if it does not, and what drew them."""
    spike = {"salient_ratio": 0.1, **spike}
    density = spike["salient_ratio"]
    return random_attention(heads, kv_heads, dim, seed=seed, density=density, **spike)


def attend(
    build: Any,
    tables: TritonAttention,
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
    multiprocessors: int,
    new: cuda_attention.NewToken | None = None,
) -> Tensor:
    """What the kernel makes of float queries `[B, H, 1, D]` and payloads of K and V."""
    query, key, value = operands
    batch, heads, _, channels = query.shape
    strides = (0, 0)
    if mask is not None:
        mask = mask.expand(batch, *mask.shape[1:])
        strides = mask.stride(0), mask.stride(3)
    sizes = (tables.groups, tables.shared, tables.planes)
    sizes = (*sizes, tables.key_row[1], tables.value_row[1], channels**-0.5)
    slots = (tables.key_slot, tables.value_slot)
    out = torch.full((batch, 1, heads, channels), 77.0, dtype=dtype)
    launch = cuda_attention.arguments(
        *(query, key, value, (mask, *strides)),
        *((*slots, tables.query_capacity, tables.query_clip), sizes, out, multiprocessors, new),
    )
    late = (query, key, value) if new is None else (query, new.cos, new.sin, new.position)
    launched(build, "attention", launch, late)
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "keys", "mask", "spike"),
    [
        (2, 2, 128, 70, "float", {}),
        (6, 2, 64, 600, "empty", {"kv_salient_steps": 4, "query_groups": True}),
        (8, 1, 32, 33, "bool", {"value_range": "shared", "query_groups": True}),
        (2, 1, 64, 300, "none", {"kv_salient_steps": 1}),
        (1, 1, 128, 1, "blind", {"query_groups": True}),
        (2, 1, 128, 40, "bool", {"salient_ratio": 0.5, "activation_bits": 3}),
    ],
    ids=["float", "empty", "bool", "none", "blind", "many"],
)
@torch.no_grad()
def test_attention_of_one_token_is_that_of_torch(
    build: Any,
    tolerance: Any,
    heads: int,
    kv_heads: int,
    dim: int,
    keys: int,
    mask: str,
    spike: dict[str, Any],
) -> None:
    module, generator = with_random_groups(heads, kv_heads, dim, spike, seed=keys)
    batch, bound = 2, tolerance.two_terms
    shapes = ((heads, 1), (kv_heads, keys), (kv_heads, keys))
    query, key, value = (torch.randn(batch, *s, dim, generator=generator) for s in shapes)
    key[..., 0] *= 20
    payloads = module._encode_key_value(key, value)
    seen = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    seen[0, ..., : keys // 3] = False
    if mask == "empty":
        seen[..., keys // 2 :] = False
    if mask == "blind":
        seen[1] = False
    hides: Tensor | None = seen
    dtype = torch.float32
    if mask == "none":
        hides = None
    elif mask != "bool":
        dtype = torch.bfloat16
        query = query.to(dtype)
        hides = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        bound = tolerance.half_precision
    if mask == "float":
        assert hides is not None
        hides[..., -1] = 0.5  # a bias
    encoders = (module.q_encoder, module.k_encoder, module.v_encoder)
    tables = TritonAttention.of(*encoders)
    out = attend(build, tables, (query, *payloads), hides, dtype, 4 * kv_heads)
    expected = spiking_attention(module, query, *payloads, hides, dim**-0.5)[0]
    if mask == "blind":
        assert not out[1].any()
        out, expected = out[:1], expected[:1]
    torch.testing.assert_close(
        out.float(), expected.float(), rtol=0, atol=bound * float(value.abs().max())
    )


ROTATED = {"rotation": "groups", "key_offset": True}


def store_and_attend(
    build: Any,
    sizes: tuple[int, int, int],
    cache: tuple[int, int, int],
    spike: dict[str, Any],
    dtype: torch.dtype,
    multiprocessors: int = 16,
) -> None:
    """Assert the payloads of the kernel that only stores, and the output of the one that only attends."""
    (heads, kv_heads, dim), (batch, keys, position) = sizes, cache
    module, generator = with_random_groups(heads, kv_heads, dim, spike, seed=position)
    kernels = kernels_of(module)
    projected = torch.randn(batch, 1, (heads + 2 * kv_heads) * dim, generator=generator)
    projected[..., dim // 2 :: dim] *= 20
    projected = projected.to(dtype)
    cos, sin = torch.randn(2, batch, 1, dim, generator=generator).to(dtype)
    old = (torch.randn(batch, kv_heads, keys, dim, generator=generator) for _ in range(2))
    stored = [payload.contiguous() for payload in module._encode_key_value(*old)]
    mine = [payload.clone() for payload in stored]
    length, own_length = torch.zeros(2, 1, dtype=torch.int64)
    place = torch.tensor([position])
    query = store_heads(
        *(projected, cos, sin, heads, True, *stored, length, place),
        *(kernels.key_slot, kernels.value_slot, kernels.capacity, kernels.key_clip),
        *(kernels.value_clip, kernels.shared, kernels.planes, kernels.slots),
        *(kernels.key_row[1], kernels.value_row[1], kernels.order, kernels.blocks, kernels.offset),
    )
    seen = torch.arange(keys) <= position
    mask = torch.zeros(1, 1, 1, keys).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = attend(build, kernels, (query, *stored), mask, dtype, multiprocessors)

    mixed = () if kernels.order is None else mixing_of(tuple(kernels.blocks))[0]
    new = cuda_attention.NewToken(
        *(cos, sin, kernels.order, kernels.offset, kernels.capacity, kernels.key_clip),
        *(kernels.value_clip, place, own_length, mixed),
    )
    rows = projected.unflatten(2, (-1, dim)).transpose(1, 2)[:, :heads]
    out = attend(build, kernels, (rows, *mine), mask, dtype, multiprocessors, new)
    for ours, theirs in zip((*mine, own_length, out), (*stored, length, expected), strict=True):
        assert torch.equal(ours, theirs)


# Heads, KV heads, channels; sequences, places in the cache, and that of the new token.
@pytest.mark.parametrize(
    ("heads", "cache", "spike", "dtype"),
    [
        ((2, 2, 128), (2, 70, 64), ROTATED, torch.float32),
        ((2, 2, 128), (2, 70, 64), ROTATED, torch.bfloat16),
        ((2, 2, 128), (2, 70, 64), ROTATED, torch.float16),
        (
            *((6, 2, 64), (2, 70, 40)),
            {"rotation": "groups", "kv_salient_steps": 4, "query_groups": True},
            torch.float16,
        ),
        (
            *((8, 1, 32), (2, 70, 0)),
            {"rotation": "groups", "value_range": "shared", "query_groups": True},
            torch.bfloat16,
        ),
        (
            *((2, 1, 64), (2, 70, 69)),
            {"kv_salient_steps": 1, "key_offset": True},
            torch.float32,
        ),
        (  # behind the end
            *((2, 1, 128), (2, 70, 70)),
            {"salient_ratio": 0.5, "activation_bits": 3},
            torch.bfloat16,
        ),
        # Among the keys that a warp takes after its first ones; in its second round.
        ((1, 1, 32), (1, 2110, 2080), {}, torch.bfloat16),
        ((1, 1, 32), (1, 8230, 8200), {}, torch.float32),
    ],
    ids=["float", "bfloat", "half", "steps", "shared", "one", "many", "later", "round"],
)
@torch.no_grad()
def test_attention_stores_the_new_token(
    build: Any,
    heads: tuple[int, int, int],
    cache: tuple[int, int, int],
    spike: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    store_and_attend(build, heads, cache, spike, dtype)


@torch.no_grad()
def test_attention_fetches_keys_that_a_device_has_no_room_to_hold(build: Any) -> None:
    store_and_attend(build, (2, 1, 32), (2, 580, 550), {}, torch.bfloat16, multiprocessors=1)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((512,), torch.bfloat16, {}),
        ((1408, 128), torch.bfloat16, {}),  # blocks of 256 and 128
        ((352, 48), torch.float32, {"offset": False}),  # 256 + 64 + 32, 32 + 16
        ((9984, 1024), torch.bfloat16, {"rows": 2}),
        ((1280, 256), torch.float32, {"mode": 1}),
        ((1280, 256), torch.bfloat16, {"mode": 2, "rows": 2}),
        ((352, 48), torch.float16, {}),
    ],
    ids=["one", "two", "small", "7B", "shared", "commensurate", "half"],
)
def test_gated_rows_are_rotated_and_encoded(
    build: Any, sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The bits of the kernel in Triton, which has a row in one block of threads."""
    k, rows, mode = sum(sizes), options.get("rows", 1), options.get("mode", 0)
    generator = torch.Generator().manual_seed(k)
    both = torch.randn(rows, 2 * k, generator=generator).to(dtype)
    gate, up = both[:, :k], both[:, k:]
    offset = torch.randn(k, generator=generator) / 8 if options.get("offset", True) else None
    capacities = (15, 30)[: len(sizes)]
    kind = {"shared": mode == 1, "commensurate": mode == 2}
    spec = EncoderSpec(torch.arange(k), sizes, capacities, name="layer", **kind)
    plan = (
        TritonBackend()
        .prepare(dataclasses.replace(spec_of(8, sizes, capacities, False), encoder=spec))
        .plan
    )
    expected = silu_mul_encode(
        *(gate, up, sizes, plan.order, plan.segments, plan.capacities, plan.clip, mode, offset),
        runs=plan.runs,
    )
    outputs = tuple(torch.full_like(t, 77) for t in expected)
    assert cuda_encode._aligned(sizes, tuple(plan.runs or ()))
    launch = cuda_encode.gated_launch(
        gate, up, (offset, plan.capacities, plan.clip), outputs, plan.runs or (), mode
    )
    launched(build, "gated", launch, late=(gate, up))
    for mine, other in zip(outputs, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((300,), torch.bfloat16, {}),
        ((1920, 168), torch.bfloat16, {"rows": 3}),  # padding, and a part of 1024 channels
        ((4224, 128), torch.float32, {}),  # constants read late
        ((256, 128), torch.float32, {"mode": 1, "without": "offset added gain"}),
        ((384, 128), torch.bfloat16, {"mode": 2, "rows": 2}),
        ((256, 128), torch.float16, {}),
        # Ranges of words of two channels; groups that meet within 1024 channels.
        ((1920, 168), torch.bfloat16, {"without": "offset gain", "rows": 2}),
        ((4608, 512), torch.float16, {"without": "offset added"}),
        ((384, 128), torch.bfloat16, {"mode": 2, "without": "offset"}),
        ((300,), torch.float16, {"without": "offset added gain"}),
        ((256, 128), torch.float32, {"near": True}),
    ],
    ids=[
        *("one", "two", "long", "shared", "commensurate", "half", "words", "words-long"),
        *("words-commensurate", "words-one", "near"),
    ],
)
def test_normalised_rows_are_encoded(
    build: Any, sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The bits of the norm and of the encoder one after the other."""
    k, many, mode = sum(sizes), options.get("rows", 1), options.get("mode", 0)
    without = options.get("without", "").split()
    generator = torch.Generator().manual_seed(k)
    x, added = ((torch.randn(many, k, generator=generator) * 3).to(dtype) for _ in range(2))
    gain = torch.rand(k, generator=generator).add(0.5).to(dtype)
    total = x if "added" in without else x + added
    normed = rms_norm(total, None if "gain" in without else gain, 1e-5)
    offset = None if "offset" in without else torch.randn(k, generator=generator) / 8
    if "near" in options:  # the row is far smaller than what a rehearsal makes of the offset
        offset = normed[0].float() * 1.01
    capacities = (15, 30 if mode == 2 else 200)[: len(sizes)]
    kind = {"shared": mode == 1, "commensurate": mode == 2}
    spec = EncoderSpec(torch.arange(k), sizes, capacities, name="layer", **kind)
    linear = dataclasses.replace(spec_of(8, sizes, capacities, False), encoder=spec)
    plan = TritonBackend().prepare(linear).plan
    expected = encode_plan(normed, plan, offset)
    rows = cuda_encode.NormedRows(
        *(
            x,
            None if "added" in without else added,
            None if "gain" in without else gain,
            1e-5,
            offset,
        ),
        *(plan.capacities, plan.clip, plan.runs, mode),
    )
    assert "compute capability" in str(rows.unsuitable())
    outputs = (torch.zeros_like(x), *(torch.full_like(t, 77) for t in expected))
    launched(build, "normed", cuda_encode.normed_launch(rows, outputs), late=(x, added))
    for mine, other in zip(outputs[1:], expected, strict=True):
        assert torch.equal(mine, other)
    assert "added" in without or torch.equal(outputs[0], total)


def test_a_rehearsal_reads_and_writes_nothing_of_others(build: Any) -> None:
    x, gain = torch.zeros(2, 300), torch.ones(300)
    groups, offset = torch.ones(1), torch.zeros(300)
    rows = cuda_encode.NormedRows(x, x, gain, 1e-5, offset, groups, groups, [0, 384, 300, 0], 0)
    dtypes = (torch.float32, torch.uint8, torch.float32, torch.int32, torch.int32)
    outputs = tuple(torch.full((2, 384), 77, dtype=dtype).share_memory_() for dtype in dtypes)
    planned = cuda_encode.normed_launch(rows, outputs)
    arguments = (None, None, *planned.arguments[2:])  # who reads x or what is added crashes
    planned = planned._replace(arguments=arguments, macros={**planned.macros, "REHEARSAL_ONLY": 1})
    build("normed", planned.macros)
    child = os.fork()
    if child == 0:  # pragma: no cover
        launched(build, "normed", planned)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(bool((output == 77).all()) for output in outputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"x": torch.zeros(65, 8)}, "64 rows"),
        ({"gain": torch.ones(8, dtype=torch.bfloat16)}, "one dtype"),
        ({"runs": None}, "neighbours"),
        ({"runs": [0, 128, 4, -1, 128, 256, 4, 4]}, "neighbours"),
        ({"runs": [0, 128, 6, 0, 128, 256, 2, 6]}, "in fours"),
    ],
    ids=["none", "rows", "dtype", "unknown", "scattered", "fours"],
)
def test_other_norms_run_on_triton(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(cuda_encode, "without", lambda _device: None)
    one = torch.ones(1)
    rows = cuda_encode.NormedRows(
        *(torch.zeros(2, 8), None, torch.ones(8), 1e-5, None, one, one, [0, 128, 8, 0], 0)
    )._replace(**change)
    found = rows.unsuitable()
    assert found is None if reason is None else reason in str(found)


RESIDUALS = {
    f"{name}-{kind}{'-bias' * bias}": (sizes, dtype, bias, False)
    for name, sizes in (("one", (300,)), ("two", (130, 33)))
    for kind, dtype in (("half", torch.bfloat16), ("float", torch.float32))
    for bias in (False, True)
} | {"commensurate": ((130, 33), torch.bfloat16, True, True)}


@everywhere(
    list(RESIDUALS.values()),
    list(RESIDUALS),
    **dict.fromkeys(("tiles64", "tiles192", "narrow"), "commensurate"),
)
def test_a_residual_is_added_to_rounded_outputs(build: Any, shape: Any, case: Any) -> None:
    name, rows, macros = shape
    sizes, dtype, bias, commensurate = case
    n = 40 if name == "rows" else 264
    spec = spec_of(n, sizes, (15, 30)[: len(sizes)], bias, commensurate)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, sum(sizes), generator=generator)
    reference = ReferenceBackend()
    y = reference.linear(x, reference.prepare(spec)).to(dtype)
    residual = (torch.randn(rows, n, generator=generator) * y.float().std()).to(dtype)
    assert torch.equal(run(build, name, macros, x, spec, dtype, residual), residual + y)
