"""Compiles the C kernels with the system compiler at first use and keeps the library in a cache.

The cache key hashes the sources, the flags and the compiler's predefined macros (its version and
the instruction set of this CPU), so a library never runs on a machine it was not built for.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from snnllm.kernels.disk_cache import CACHE_VARIABLE, cache_directory, replaced

LOGGER = logging.getLogger("snnllm.kernels")
SOURCES = ("kernels.c", "attention.h", "encode.h", "head.h", "rotation.h", "tile.h")
_COMPILERS = ("cc", "gcc", "clang")
# -ffp-contract=off: a fused multiply-add rounds differently from the reference.
_BASE_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared")
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


class CompilerError(RuntimeError):
    """The native library cannot be built here; the message is the reason."""


def find_compiler() -> list[str]:
    """Return the C compiler as a command: the environment's `CC`, else cc, gcc or clang.

    `CC` may hold a wrapper or options, such as `ccache gcc` or `gcc -m64`.

    Raises:
        CompilerError: none is installed, or `CC` is no command.
    """
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CompilerError(f"CC={os.environ['CC']!r} is no command: {error}") from error
    for name, *options in [chosen] if chosen else [[name] for name in _COMPILERS]:
        path = shutil.which(name)
        if path is not None:
            return [path, *options]
    names = chosen[:1] or _COMPILERS
    raise CompilerError(f"no C compiler found (looked for {', '.join(names)})")


def build(definitions: tuple[str, ...] = ()) -> Path:
    """Return the compiled library, building it when the cache does not hold it.

    Args:
        definitions: extra flags, e.g. `-DSNN_PORTABLE` for the plain C path.

    Raises:
        CompilerError: no compiler, or every set of flags fails; holds the compiler's last words.
    """
    compiler = find_compiler()
    folder = Path(__file__).parent
    message = ""
    for optional in _OPTIONAL_FLAGS:
        flags = (*_BASE_FLAGS, *optional, *definitions)
        macros = _run([*compiler, *optional, "-dM", "-E", "-x", "c", os.devnull])
        if macros.returncode != 0:
            message = macros.stderr
            continue
        digest = hashlib.sha256(" ".join(flags).encode() + macros.stdout.encode())
        for name in SOURCES:
            digest.update((folder / name).read_bytes())
        target = cache_directory() / f"kernels-{digest.hexdigest()[:20]}.so"
        if target.exists():
            return target
        message = _compile(compiler, flags, folder / SOURCES[0], target)
        if not message:
            LOGGER.info("compiled the native kernels with %s", shlex.join([*compiler, *flags]))
            return target
    raise CompilerError(
        f"{shlex.join(compiler)} cannot compile the kernels: {message.strip()[-500:]}"
    )


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled library.

    Raises:
        CompilerError: the system refuses it, e.g. a cache on a file system without execution.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"the compiled kernels cannot be loaded: {error}") from error


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, target: Path) -> str:
    """Compile into the cache; the compiler's words if it refuses."""
    try:
        with replaced(target) as output:
            result = _run([*compiler, *flags, str(source), "-o", str(output), "-lm"])
            if result.returncode != 0:
                output.unlink(missing_ok=True)
                return result.stderr or f"exit status {result.returncode}"
    except OSError as error:
        raise CompilerError(
            f"the cache {target.parent} is not writable ({error}); set {CACHE_VARIABLE}"
        ) from error
    return ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilerError(f"{command[0]} does not run: {error}") from error
