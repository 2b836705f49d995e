"""A stand-in for CuPy on machines without a GPU: RawKernel through the C++ compiler, on the CPU.

It runs the CUDA source thread after thread, so that the arithmetic and the indexing of the kernels
are tested everywhere; what a GPU adds (streams, devices) is tested there.
"""

import ctypes
import hashlib
import subprocess
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

SHIM = r"""
#include <cmath>
#include <cstring>
struct Index { long long x; };
static Index blockIdx, blockDim, threadIdx;
#define __device__ inline
#define __global__
#define __align__(n) alignas(n)
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
"""


def deprecated(pointer: int) -> None:
    """ExternalStream as of CuPy 14: it warns the caller, which is an error in these tests."""
    warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)


class Stream:
    """The stream protocol as CuPy 14 checks it."""

    @classmethod
    def from_external(cls, stream: object):
        version, pointer = stream.__cuda_stream__()
        assert (version, type(pointer)) == (0, int)
        return nullcontext()


class Cupy:
    """What the backend uses of CuPy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.compiled = folder, 0
        self.cuda = SimpleNamespace(
            Device=lambda index: nullcontext(), Stream=Stream, ExternalStream=deprecated
        )

    def RawKernel(self, source: str, name: str, options: tuple[str, ...]):
        head = source[source.index(f"void {name}(") :]
        parameters = head[head.index("(") + 1 : head.index(") {")].replace("\n", " ").split(",")
        names = [p.split()[-1].lstrip("*") for p in parameters]
        loop = f"""
        extern "C" void run(long long blocks, long long threads, {",".join(parameters)}) {{
          blockDim.x = threads;
          for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {name}({",".join(names)});
        }}"""
        # float16 needs PTX, which a CPU does not have.
        source = source.replace('asm("cvt', 'f16("cvt').replace("asm(", "f16(")
        f16 = "#define f16(...) __builtin_trap()\n"
        code = self.folder / f"{hashlib.sha1(repr((name, options)).encode()).hexdigest()}.cpp"
        code.write_text(SHIM + f16 + source + loop)
        library = code.with_suffix(".so")
        flags = ["-O1", "-w", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, *options, "-o", library, code], check=True)
        self.compiled += 1
        run = ctypes.CDLL(str(library)).run
        kinds = {int: ctypes.c_longlong, float: ctypes.c_double}

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[int | float, ...]) -> None:
            run(*(kinds[type(a)](a) for a in (*grid, *block, *arguments)))

        return launch
