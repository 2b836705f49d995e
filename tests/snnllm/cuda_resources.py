"""What the CUDA compiler says of the registers of a kernel."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from snnllm.kernels.cuda import driver


class Resources(NamedTuple):
    """Of a kernel, functions that it calls included.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of them that lie in memory.
        log: Of the compiler.
    """

    registers: int
    spilled: int
    log: str


def resources(monkeypatch: pytest.MonkeyPatch, source: str, macros: dict[str, int]) -> Resources:
    """Of a source, compiled for Hopper."""
    options = driver._options
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_options", lambda *given: [*options(*given), "--ptxas-options=-v"])
        code, log = driver.compiled(source, tuple(macros.items()), "sm_90a")
    assert code.startswith(b"\x7fELF")
    (used,) = map(int, re.findall(r"Used (\d+) registers", log))
    return Resources(used, max(map(int, re.findall(r"(\d+) bytes spill stores", log))), log)
