"""The output head in 8 bits for a few rows, in C on the CPU: torch would convert the table at every token."""

from __future__ import annotations

import torch
from torch import Tensor

from snnllm.kernels import get_backend
from snnllm.kernels.cpu.backend import library

MOST_ROWS = 8
"""Beyond, a matrix product in torch is faster."""


def multiplies(x: Tensor) -> bool:
    """Whether the C function serves rows `[M, H]`: few, on the CPU, outside of graphs, with a compiler."""
    return (
        x.device.type == "cpu"
        and 0 < len(x) <= MOST_ROWS
        and x.dtype is not torch.float64
        and not torch.compiler.is_compiling()
        and get_backend("auto", "cpu").name == "native"
    )


def head_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The logits `(x codes^T) scale`; carries no gradient.

    Args:
        x: float `[M, H]` on the CPU.
        codes: int8 `[V, H]`.
        scale: float32 `[V]`.

    Returns:
        float32 `[M, V]`.

    Raises:
        TypeError: The codes are not int8.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"the codes of a head must be int8, got {codes.dtype}.")
    rows, codes, scale = x.detach().float().contiguous(), codes.contiguous(), scale.contiguous()
    logits = torch.empty(len(rows), len(codes), dtype=torch.float32)
    library().snn_head(
        *(rows.data_ptr(), codes.data_ptr(), scale.data_ptr(), logits.data_ptr()),
        *(len(rows), len(codes), rows.shape[1], torch.get_num_threads()),
    )
    return logits
