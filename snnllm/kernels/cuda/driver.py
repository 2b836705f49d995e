"""CUDA C++ at run time: compiled by NVRTC for the device at hand, launched through the driver.

Needs the package cuda-bindings and NVRTC. Compiled once a source, set of macros and device, and kept for
other processes; the driver is asked for what CuPy cannot launch: tensor maps and programmatic dependent launch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurons.backends.device import on
from snnllm.kernels.disk_cache import cache_directory, replaced

_LOG = logging.getLogger(__name__)
SWIZZLES = {32: 1, 64: 2, 128: 3}
"""Bytes of a row of a box to the number of its swizzle (`CUtensorMapSwizzle`)."""
_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Value(ctypes.Union):
    _fields_ = (("padding", ctypes.c_char * 64), ("words", ctypes.c_uint * 16))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_char * 4), ("value", _Value))


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """What the copy engine needs to know of a matrix; 64-byte aligned for the driver."""

    _fields_ = (("raw", ctypes.c_ubyte * 192),)

    @property
    def at(self) -> int:
        """Address of the 128 bytes."""
        return -(-ctypes.addressof(self) // 64) * 64


@dataclass(frozen=True)
class Kernel:
    """A kernel on a device.

    Attributes:
        function: the driver's handle.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
    """

    function: int
    threads: int
    shared: int

    def __call__(self, blocks: int, arguments: tuple[Any, ...], early: bool = False) -> None:
        """Launch on torch's current stream of the current device.

        Args:
            blocks: Of the grid.
            arguments: Tensors, ints and floats (32 bits), None (a null pointer) and tensor maps, in order.
            early: May start before the kernel in front ends (it waits itself).
        """
        attribute = _Attribute()
        attribute.id, attribute.value.words[0] = _EARLY, 1
        launch = _Launch(
            *(blocks, 1, 1, self.threads, 1, 1, self.shared),
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(early),
        )
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(
            *(v.at if isinstance(v, TensorMap) else ctypes.addressof(v) for v in values)
        )
        function = ctypes.c_void_p(self.function)  # of an int, ctypes passes 32 bits
        _check(_driver().cuLaunchKernelEx(ctypes.byref(launch), function, pointers, None))


class Launch(NamedTuple):
    """A launch, before there is a device.

    Attributes:
        source: As `compiled` takes it.
        name: Of the kernel.
        macros: Of the source.
        blocks: Of the grid.
        threads: Of a block.
        shared: Bytes of shared memory of a block.
        arguments: Of the kernel.
    """

    source: str
    name: str
    macros: dict[str, int]
    blocks: int
    threads: int
    shared: int
    arguments: tuple[Any, ...]

    def __call__(self, device: torch.device) -> None:
        """Launch on a device; early, as in `Kernel`: these kernels wait for the one in front themselves."""
        macros = tuple(self.macros.items())
        with on(device):
            kernel = load(self.source, macros, self.name, self.threads, self.shared, device)
            kernel(self.blocks, self.arguments, early=True)


@cache
def without(device: torch.device) -> str | None:
    """Return None when the kernels run on a device, else the reason why not; said once where it is a surprise."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return f"{device} is not of compute capability 9.0"
    reason = missing()
    if reason is not None:
        _LOG.warning("kernels in CUDA C++ are off, slower ones in Triton run: %s", reason)
    return reason


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def missing() -> str | None:
    """Return None when sources can be compiled and launched here, else the reason why not."""
    try:
        _driver()
    except OSError as error:
        return f"no CUDA driver ({error})"
    return compiler_missing()


def compiler_missing() -> str | None:
    """Return None when sources can be compiled here, also without a GPU, else the reason why not."""
    try:
        _nvrtc().nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"no CUDA compiler at run time ({error}); pip install cuda-bindings nvidia-cuda-nvrtc"
        )
    return None


def compiled(
    source: str, macros: tuple[tuple[str, int], ...], architecture: str
) -> tuple[bytes, str]:
    """Machine code of a source, and what the compiler says of it.

    Args:
        source: CUDA C++ without includes.
        macros: Names and values.
        architecture: As `sm_90a`.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    nvrtc, options = _nvrtc(), _options(macros, architecture)
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"linear.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    raw = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, raw)
    log = raw.decode(errors="replace").strip("\0\n ")
    if int(status):
        raise RuntimeError(f"NVRTC refuses {dict(macros)}: {log}")
    code = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code, log


def machine_code(
    source: str, macros: tuple[tuple[str, int], ...], architecture: str, fresh: bool = False
) -> bytes:
    """As `compiled`, from the cache if any process has compiled it before; `fresh` replaces what is there."""
    _, *version = _nvrtc().nvrtcVersion()
    parts = "\0".join([*map(str, version), *_options(macros, architecture), source])
    name = f"{hashlib.sha256(parts.encode()).hexdigest()[:20]}.cubin"
    with suppress(OSError, RuntimeError):  # no file, or no home directory
        if not fresh:
            return (cache_directory() / name).read_bytes()
    code, _ = compiled(source, macros, architecture)
    try:
        with replaced(cache_directory() / name) as file:
            file.write_bytes(code)
    except (OSError, RuntimeError) as error:
        _LOG.info("compiled kernels are not kept for the next process: %s", error)
    return code


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def _options(macros: tuple[tuple[str, int], ...], architecture: str) -> list[str]:
    fixed = (f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=false", "-default-device")
    return [*fixed, *(f"-D{name}={value}" for name, value in macros)]


@cache
def load(
    source: str,
    macros: tuple[tuple[str, int], ...],
    name: str,
    threads: int,
    shared: int,
    device: torch.device,
) -> Kernel:
    """The kernel `name` of a source on a device; arguments as `compiled` and `Kernel`."""
    major, minor = torch.cuda.get_device_capability(device)
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream(device)  # torch's context is the current one from here on
    architecture = f"sm_{major}{minor}a"
    code = machine_code(source, macros, architecture)
    if not code or driver.cuModuleLoadData(ctypes.byref(module), code):  # a damaged file
        code = machine_code(source, macros, architecture, fresh=True)
        _check(driver.cuModuleLoadData(ctypes.byref(module), code))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    _check(driver.cuFuncSetAttribute(function, _SHARED, shared))
    assert function.value is not None
    return Kernel(function.value, threads, shared)


def tensor_map(matrix: Tensor, rows: int, columns: int) -> TensorMap:
    """The map of a matrix `[R, C]`, contiguous, in swizzled boxes of `rows` times `columns` bytes."""
    height, width = len(matrix), matrix.shape[1] * matrix.element_size()
    return _tensor_map(matrix.data_ptr(), height, width, rows, columns)


@lru_cache(maxsize=4096)
def _tensor_map(
    address: int, height: int, width: int, box_rows: int, box_columns: int
) -> TensorMap:
    out = TensorMap()
    sizes, pitch = (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(width)
    box, steps = (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    byte, rank, interleave, promotion, zeros = 0, 2, 0, 2, 0  # 128 bytes at a time to the L2 cache
    _check(
        _driver().cuTensorMapEncodeTiled(
            *(ctypes.c_void_p(out.at), byte, rank, ctypes.c_void_p(address)),
            *(sizes, pitch, box, steps, interleave, SWIZZLES[box_columns], promotion, zeros),
        )
    )
    return out


def _value(argument: Any) -> Any:
    if isinstance(argument, TensorMap):
        return argument
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the CUDA driver says: {(text.value or b'unknown error').decode()}")
