"""Collapsed linears in CUDA C++: which linears they serve, what they compile to, and their integers."""

from __future__ import annotations

import ctypes
import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snnllm.kernels import EncoderSpec, LinearSpec, ReferenceBackend, segments_of
from snnllm.kernels.disk_cache import CACHE_VARIABLE

pytest.importorskip("triton", reason="the package triton is not installed")
from snnllm.kernels.cuda import attention_source as cuda_attention_source
from snnllm.kernels.cuda import driver as cuda_driver
from snnllm.kernels.cuda import gated_source as cuda_gated_source
from snnllm.kernels.cuda import linear as cuda_linear
from snnllm.kernels.cuda import normed_source as cuda_normed_source
from snnllm.kernels.cuda import rows_source as cuda_rows_source
from snnllm.kernels.cuda import tiles_source as cuda_tiles_source
from snnllm.kernels.cuda.attention_token_source import packed_mixing
from snnllm.kernels.cuda.encode import layout_macros
from snnllm.kernels.cuda.linear import Rows, Tiles, choose_shape, unsuitable, whole_tiles
from snnllm.kernels.cuda.primitives import OUTPUTS
from snnllm.kernels.triton.backend import TritonBackend, encode_plan, multiply
from tests.snnllm.cuda_resources import resources

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    cuda_driver.compiler_missing() is not None, reason="NVRTC is not installed"
)

MOST_SHARED = 227 * 1024
SHAPES = [
    cuda_linear._HALF,
    *(
        choose_shape(m, n, 132)
        for m, n in itertools.product(
            (1, 8, 16, 17, 32, 33, 64, 256, 512, 513, 4096), (512, 4096, 11008)
        )
    ),
]


def macros(
    shape: Rows | Tiles, rows8: int = 1, segments: int = 2, merged: int = 0
) -> dict[str, int]:
    own = {name.upper(): int(value) for name, value in shape._asdict().items()}
    more = {"ROWS8": rows8} if isinstance(shape, Rows) else {}
    own |= {**more, "SEGMENTS": segments, "MERGED": merged}
    return {**own, "BIAS": 1, "RESIDUAL": 0, "JOINT": 1}


@pytest.mark.parametrize(
    ("columns", "bits", "segments"), [(64, 2, 1), (64, 8, 1), (64, 4, 3), (68, 4, 2)]
)
def test_other_linears_run_on_triton(columns: int, bits: int, segments: int) -> None:
    reason = unsuitable(CPU, columns, bits, segments)
    assert reason is not None
    assert f"{bits} bits, {segments} segments, {columns} outputs" in reason


def test_other_devices_run_on_triton() -> None:
    assert "compute capability" in str(unsuitable(CPU, 64, 4, 2))


def test_a_missing_compiler_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_name: str) -> None:
        raise ImportError("no module")

    monkeypatch.setattr(cuda_driver, "_driver", lambda: None)
    cuda_driver.without.cache_clear()
    monkeypatch.setattr("snnllm.kernels.cuda.driver.importlib.import_module", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    device = torch.device("cuda", 7)
    with caplog.at_level(logging.WARNING):
        reasons = [unsuitable(device, 64, 4, 2) for _ in range(2)]
    assert "pip install cuda-bindings" in str(reasons[0])
    assert reasons[0] == reasons[1]
    assert len(caplog.records) == 1


def test_handles_of_kernels_are_passed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def launched(_launch: int, function: int, _arguments: int, _extra: int) -> int:
        seen.append(function)
        return 0

    library = ctypes.CDLL(
        None
    )  # calls as those of the driver's library: without types of arguments
    callback = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(launched)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    driver = SimpleNamespace(cuLaunchKernelEx=library._FuncPtr(address))
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cuda_driver.Kernel(0x7F12_3456_7890, 32, 0)(1, (1, None))
    assert seen == [0x7F12_3456_7890]


@pytest.mark.parametrize("rows", range(1, 33))
def test_shared_memory_of_few_rows_fits(rows: int) -> None:
    for columns in (64, 4096, 11008, 28672):
        shape = choose_shape(rows, columns, 132)
        assert isinstance(shape, Rows)
        rows8 = 1 << (-(-rows // 8) - 1).bit_length()
        shared = cuda_rows_source.shared_bytes(rows8, shape.strips, shape.stages, 2, 0, residual=4)
        # Each resident block takes 1 KiB more.
        assert (shared + 1024) * shape.resident <= MOST_SHARED + 1024


@pytest.mark.parametrize("rows", [33, 64, 128, 256, 512, 2048, 16384])
def test_shared_memory_of_many_rows_fits(rows: int) -> None:
    for columns, merged in itertools.product((64, 4096, 11008, 28672), (0, 1)):
        shape = choose_shape(rows, columns, 132)
        assert isinstance(shape, Tiles)
        for one in (shape, cuda_linear._HALF):
            assert one.shared_bytes(2, merged) <= MOST_SHARED
        assert 0 <= shape.kept <= shape.bm * shape.bn // 128 // shape.workers


@pytest.mark.parametrize(
    ("tiles", "whole"),
    [(1, 1), (132, 132), (133, 132), (198, 132), (199, 199), (512, 512), (1376, 1320)],
)
def test_the_last_tiles_are_halved_where_they_fill_at_most_half_the_device(
    tiles: int, whole: int
) -> None:
    assert whole_tiles(tiles, 132) == whole
    assert 2 * (tiles - whole) <= 132  # the halves are one round


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 11008), (1030, 4096), (600, 1032), (520, 264)]
)
def test_the_tiles_of_both_launches_cover_the_outputs_once(
    rows: int, columns: int, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Tiles, int, tuple[int, int], bool]] = []

    def kernel_of(shape: Tiles, macros: object, device: torch.device) -> object:
        return lambda blocks, arguments, early: launched.append(
            (shape, blocks, arguments[-2:], early)
        )

    monkeypatch.setattr(cuda_linear, "processors", lambda _device: 20)
    monkeypatch.setattr(cuda_linear, "_tiles_kernel", kernel_of)
    monkeypatch.setattr(cuda_linear, "tensor_map", lambda *_: None)
    count, weight = torch.zeros(rows, 128), torch.zeros(columns, 64)
    parameters = (*(torch.zeros(1, segments) for _ in range(7)), None, None)
    out = torch.zeros(1, dtype=torch.bfloat16)
    cuda_linear.launch(count, weight, parameters, out, 1, 1, early=False)
    large = launched[0][0]
    raster, height = -(-columns // large.bn), 2048 // large.bm
    covered = torch.zeros(-(-rows // large.bm), raster, 2, dtype=torch.int32)
    for shape, blocks, (first, last), early in launched:
        assert 0 < blocks <= min(20, last - first)
        assert early
        for index in range(
            first, last
        ):  # as `tile_at` of the kernel does, with rasters of 2048 rows
            top = index // shape.split // (height * raster) * height
            tall, inside = min(len(covered) - top, height), index // shape.split % (height * raster)
            halves = slice(None) if shape.split == 1 else index % 2
            covered[top + inside % tall, inside // tall, halves] += 1
    assert bool((covered == 1).all())
    rest = len(covered) * raster % 20
    assert len(launched) == (2 if 0 < rest <= 10 and len(covered) * raster > 20 else 1)


@pytest.mark.parametrize("shape", sorted({s for s in SHAPES if isinstance(s, Tiles)}), ids=str)
@pytest.mark.parametrize(("segments", "merged"), [(1, 0), (2, 0), (2, 1)])
def test_a_multiprocessor_has_shared_memory_for_one_block(
    shape: Tiles, segments: int, merged: int
) -> None:
    """Tiles of one warpgroup leave registers for a second one, which would be in the way."""
    shared = shape.shared_bytes(segments, merged)
    assert MOST_SHARED // 2 < shared <= MOST_SHARED


@needs_compiler
@pytest.mark.parametrize(
    ("out", "residual"), [*((out, 0) for out in OUTPUTS.values()), (0, 1), (1, 1), (2, 1)]
)
@pytest.mark.parametrize(("segments", "merged"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("shape", sorted(set(SHAPES), key=str), ids=str)
def test_every_shape_compiles_without_serialised_products(
    shape: Rows | Tiles, segments: int, merged: int, out: int, residual: int
) -> None:
    source = cuda_rows_source.SOURCE if isinstance(shape, Rows) else cuda_tiles_source.SOURCE
    for rows8 in (1, 2, 4) if isinstance(shape, Rows) else (0,):
        names = {**macros(shape, rows8, segments, merged), "RESIDUAL": residual, "OUT": out}
        code, log = cuda_driver.compiled(source, tuple(names.items()), "sm_90a")
        assert code.startswith(b"\x7fELF")
        assert "serialized" not in log


@needs_compiler
@pytest.mark.parametrize("residual", [0, 1])
@pytest.mark.parametrize(("segments", "merged"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("shape", sorted({s for s in SHAPES if isinstance(s, Tiles)}), ids=str)
def test_blocks_have_the_registers_that_their_warps_share(
    shape: Tiles, segments: int, merged: int, residual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps that multiply take what the others give; they would wait for ever for what the block has not."""
    names = {**macros(shape, 1, segments, merged), "OUT": 1, "RESIDUAL": residual}
    used, _, log = resources(monkeypatch, cuda_tiles_source.SOURCE, names)
    assert (
        used == {1: 128, 2: 168, 3: 128 if residual else 104}[shape.workers]
    )  # what the kernel divides
    assert used * (128 + 128 * shape.workers) <= 65536
    assert "setmaxnreg ignored" not in log


@needs_compiler
@pytest.mark.parametrize("out", [0, 1, 2])
@pytest.mark.parametrize(("groups", "mode"), [(1, 1), (2, 0), (2, 2)])
@pytest.mark.parametrize("offset", [0, 1])
def test_encoding_kernels_compile(
    monkeypatch: pytest.MonkeyPatch, out: int, groups: int, mode: int, offset: int
) -> None:
    names = {"GROUPS": groups, "RANGE_MODE": mode, "OFFSET": offset, "OUT": out}
    more, channels = groups - 1, 4096 * groups
    runs = [0, 4096, 4096, 0] if groups == 1 else [0, 512, 512, 7680, 512, 8192, 7680, 0]
    row = {**names, **layout_macros(channels, channels, runs), "ADDED": more, "GAIN": more}
    sources = [
        (cuda_gated_source.SOURCE, {**names, "CLUSTER": 2 * groups, "THREADS": 96}),
        (cuda_normed_source.SOURCE, row),
    ]
    for source, known in sources:
        registers, spilled, _ = resources(monkeypatch, source, known)
        assert registers <= 128  # two blocks of threads beside a linear
        assert spilled == 0


@needs_compiler
@pytest.mark.parametrize("out", [0, 1, 2])
@pytest.mark.parametrize(("channels", "stored", "cluster"), [(128, 1, 1), (64, 1, 4), (32, 0, 2)])
def test_attention_compiles(
    monkeypatch: pytest.MonkeyPatch, out: int, channels: int, stored: int, cluster: int
) -> None:
    names = {"D": channels, "G": 2, "QUERY_GROUPS": 1, "ONE_RANGE": 0, "ROWS": cluster}
    names |= {"KEY_BYTES": 80, "VALUE_BYTES": 80, "PLANES": 2, "KEY_PLANE": 2, "VALUE_PLANE": 2}
    names |= {"CLUSTER": cluster, "QUERY": out, "MASK": out, "OUT": out, "STORED": stored}
    mixed = packed_mixing((channels,) * (channels.bit_length() - 2) + (0,)) * stored
    names |= {"ROTATED": stored, "OFFSET": stored, "MIXED": mixed}
    held = int(stored and cluster == 1)
    names |= {"HELD": held, "PLANES": 1 if held else 2}
    registers, spilled, _ = resources(monkeypatch, cuda_attention_source.SOURCE, names)
    assert registers <= (176 if held else 255)  # beside a block of a linear of few rows, with 20480
    assert spilled == 0


@needs_compiler
def test_a_broken_source_is_refused_with_the_log() -> None:
    with pytest.raises(RuntimeError, match="NVRTC refuses"):
        cuda_driver.compiled("int f( {", (("WRONG", 1),), "sm_90a")


def test_machine_code_is_kept_for_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By source, macros, architecture and version of the compiler; a cache that cannot be written is none."""
    version, made = [0, 13, 0], []

    def compiled(source: str, *given: Any) -> tuple[bytes, str]:
        made.append((source, *given))
        return f"code of {len(made)}".encode(), ""

    nvrtc = SimpleNamespace(nvrtcVersion=lambda: tuple(version))
    monkeypatch.setattr(cuda_driver, "_nvrtc", lambda: nvrtc)
    monkeypatch.setattr(cuda_driver, "compiled", compiled)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    wanted = [("a", (("M", 1),), "sm_90a"), ("a", (("M", 2),), "sm_90a"), ("b", (), "sm_90a")]
    wanted.append(("b", (), "sm_100a"))
    first = [cuda_driver.machine_code(*given) for given in wanted]
    assert first == [cuda_driver.machine_code(*given) for given in wanted]
    assert made == wanted
    assert len(list((tmp_path / "cache").iterdir())) == len(wanted)
    version[2] = 1
    assert cuda_driver.machine_code(*wanted[0]) not in first
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert cuda_driver.machine_code(*wanted[0]) == f"code of {len(made)}".encode()
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home directory")))
    assert cuda_driver.machine_code(*wanted[0]) == f"code of {len(made)}".encode()


@pytest.mark.parametrize("damaged", [b"", b"half of"])
def test_damaged_machine_code_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damaged: bytes
) -> None:
    loaded: list[bytes] = []

    class Driver:
        def cuModuleLoadData(self, _: Any, code: bytes) -> int:
            loaded.append(code)
            return int(code != b"whole")

        def cuModuleGetFunction(self, function: Any, *_: Any) -> int:
            function._obj.value = 7
            return 0

        def cuFuncSetAttribute(self, *_: Any) -> int:
            return 0

    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setattr(cuda_driver, "_nvrtc", lambda: nvrtc)
    monkeypatch.setattr(cuda_driver, "_driver", Driver)
    monkeypatch.setattr(cuda_driver, "compiled", lambda *_: (b"whole", ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    load = cuda_driver.load.__wrapped__
    assert load("a", (), "kernel", 32, 0, CPU).function == 7
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged)
    for _ in range(2):
        assert load("a", (), "kernel", 32, 0, CPU).function == 7
    assert file.read_bytes() == b"whole"
    assert [code for code in loaded if code] == [
        b"whole",
        *([damaged] * bool(damaged)),
        b"whole",
        b"whole",
    ]


def spec_of(
    seed: int,
    n: int,
    sizes: tuple[int, ...],
    capacities: tuple[int, ...],
    bias: bool,
    commensurate: bool = False,
) -> LinearSpec:
    generator = torch.Generator().manual_seed(seed)
    k = sum(sizes)
    levels = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    return LinearSpec(
        # Groups of neighbours, which encode_plain serves, or mixed ones.
        encoder=EncoderSpec(
            torch.arange(k) if seed % 2 else torch.randperm(k, generator=generator),
            *(sizes, capacities),
            name="layer",
            commensurate=commensurate,
        ),
        levels=levels.cuda(),
        scale=(torch.rand(n, 1, generator=generator) + 0.1).cuda(),
        zero=torch.randint(-8, 8, (n, 1), generator=generator).int().cuda(),
        bias=torch.randn(n, generator=generator).cuda() if bias else None,
        segments=segments_of(sizes),
        weight_bits=4,
    )


def input_of(seed: int, m: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3
    x[:, :2] *= 30
    return x.to("cuda", dtype)


def check(spec: LinearSpec, x: Tensor) -> None:
    reference, backend = ReferenceBackend(), TritonBackend()
    expected, prepared = reference.prepare(spec), backend.prepare(spec)
    assert torch.equal(backend.accumulate(x, prepared), reference.accumulate(x, expected))
    y = reference.linear(x, expected)
    assert torch.equal(backend.linear(x, prepared), y)
    residual = (torch.randn_like(y, dtype=torch.float32) * y.float().std(correction=0)).to(y.dtype)
    rows = encode_plan(x, prepared.plan)
    assert torch.equal(multiply(rows, prepared, x.dtype, residual), residual + y)
    # Copied 16 bytes at a time, from wherever it lies.
    elsewhere = torch.cat((residual.new_zeros(1), residual.flatten()))[1:].view(residual.shape)
    assert torch.equal(multiply(rows, prepared, x.dtype, elsewhere), residual + y)


@pytest.fixture
def served() -> None:
    reason = unsuitable(torch.device("cuda", torch.cuda.current_device()), 64, 4, 2)
    if reason is not None:
        pytest.skip(f"CUDA C++ kernels: {reason}")


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
@given(
    seed=st.integers(0, 2**20),
    m=st.one_of(st.integers(1, 40), st.integers(41, 700)),
    n=st.integers(1, 100).map(lambda eights: 8 * eights),
    low=st.integers(1, 1500),
    high=st.integers(0, 300),
    capacities=st.sampled_from([(15, 30), (15, 60), (127, 255), (255, 255)]),
    commensurate=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_linear(
    seed: int,
    m: int,
    n: int,
    low: int,
    high: int,
    capacities: tuple[int, int],
    commensurate: bool,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    sizes = (low, high) if high else (low,)
    commensurate &= capacities[1] < 64
    spec = spec_of(seed, n, sizes, capacities[: len(sizes)], bias, commensurate)
    check(spec, input_of(seed, m, sum(sizes), dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("columns", "rows"), [*((4096, m) for m in (1, 16, 32, 256, 2048)), (11008, 256)]
)
@pytest.mark.parametrize(
    ("sizes", "commensurate"),
    [((4096,), False), ((3686, 410), False), ((3686, 410), True)],
    ids=["one", "two", "commensurate"],
)
def test_linears_of_a_7b_model(
    sizes: tuple[int, ...], commensurate: bool, columns: int, rows: int
) -> None:
    capacities = (15, 30)[: len(sizes)]
    spec = spec_of(rows, columns, sizes, capacities, bias=False, commensurate=commensurate)
    check(spec, input_of(rows, rows, 4096, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
def test_linears_are_recorded_in_graphs() -> None:
    spec, backend = spec_of(0, 256, (300, 20), (15, 30), bias=True), TritonBackend()
    prepared = backend.prepare(spec)
    for m in (3, 100):
        x = input_of(1, m, 320, torch.bfloat16)
        backend.linear(x, prepared)
        residual = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
        multiply(encode_plan(x, prepared.plan), prepared, x.dtype, residual)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = backend.linear(x, prepared)
            # The residual is written by a kernel in front of the one that the product may overtake.
            moved = residual * 2
            added = multiply(encode_plan(x, prepared.plan), prepared, x.dtype, moved)
        x.copy_(input_of(2, m, 320, torch.bfloat16))
        graph.replay()
        expected = ReferenceBackend().linear(x, ReferenceBackend().prepare(spec))
        assert torch.equal(out, expected)
        assert torch.equal(added, residual * 2 + expected)
