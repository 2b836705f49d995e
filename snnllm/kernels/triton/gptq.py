"""The inner loop of GPTQ as one Triton kernel: a block of columns of all rows in one launch.

Rows are independent, so every program keeps a few of them in registers and rounds their columns one
after the other. Without it a conversion on a GPU is bound by a hundred thousand tiny launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neurons.backends.device import on

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

_COLUMNS = 128
_ROWS = 16


def triton_available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def round_block(
    weight: Tensor,
    spread: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Round a block of at most 128 columns, each spreading its error over those behind it.

    Args:
        weight: float32 `[columns, N]`, contiguous.
        spread: `U_kj / U_kk` of the block, float32 `[columns, columns]`, contiguous.
        scale: float32 `[columns, N]`, contiguous.
        zero: float32 `[columns, N]`, contiguous.
        top: Largest code.
        codes: uint8 `[columns, N]`, written.
        errors: float32 `[columns, N]`, written: the weight less its rounded value.
    """
    columns, rows = weight.shape
    grid: Any = (triton.cdiv(rows, _ROWS),)
    tensors = (weight, spread, scale, zero, codes, errors)
    with on(weight.device):
        _round_block[grid](*tensors, rows, float(top), columns, COLUMNS=_COLUMNS, ROWS=_ROWS)


if triton is not None:

    @triton.jit
    def _round_block(  # type: ignore[no-untyped-def]
        weight_ptr,
        spread_ptr,
        scale_ptr,
        zero_ptr,
        code_ptr,
        error_ptr,
        rows,
        top,
        columns,
        COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = row < rows
        tile = (column[:, None] < columns) & inside[None, :]
        weight = tl.load(weight_ptr + column[:, None] * rows + row[None, :], mask=tile, other=0.0)
        for k in range(columns):
            at = k * rows + row
            scale = tl.load(scale_ptr + at, mask=inside, other=1.0)
            zero = tl.load(zero_ptr + at, mask=inside, other=0.0)
            own = tl.sum(tl.where(column[:, None] == k, weight, 0.0), axis=0)
            # Adding 1.5 * 2^23 and taking it off rounds half to even.
            level = (own / scale + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(level + zero, 0.0), top)
            error = own - (code - zero) * scale
            later = (column < columns) & (column > k)
            spread = tl.load(spread_ptr + k * columns + column, mask=later, other=0.0)
            weight -= spread[:, None] * error[None, :]
            tl.store(code_ptr + at, code.to(tl.uint8), mask=inside)
            tl.store(error_ptr + at, error, mask=inside)
