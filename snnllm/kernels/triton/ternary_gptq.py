"""The inner loops of ternary GPTQ as Triton kernels: a block of columns of all rows in one launch.

As in `gptq`, rows are independent and a program keeps a few of them in registers. Without the
kernels a conversion on a GPU is bound by millions of tiny launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neurons.backends.device import on
from snnllm.kernels.triton.gptq import triton_available

if triton_available():
    import triton
    import triton.language as tl

COLUMNS = 128
"""Most columns of a block."""
_ROWS = 16


def fire_block(
    weight: Tensor, spread: Tensor, threshold: Tensor, steps: int, counts: Tensor, errors: Tensor
) -> None:
    """Round the columns of a block, each spreading its error over those behind it.

    Args:
        weight: Compensated weights, float32 `[columns, N]`, contiguous; at most 128 columns.
        spread: `U_kj / U_kk` of the block, float32 `[columns, columns]`, contiguous.
        threshold: float32 `[N]`.
        steps: T.
        counts: Spike counts, float32 `[columns, N]`, written.
        errors: Weight less its value, float32 `[columns, N]`, written.
    """
    columns, rows = weight.shape
    grid: Any = (triton.cdiv(rows, _ROWS),)
    with on(weight.device):
        _fire_block[grid](
            *(weight, spread, threshold, counts, errors),
            *(rows, columns, float(steps)),
            COLUMNS=COLUMNS,
            ROWS=_ROWS,
        )


def refine_block(
    gradient: Tensor,
    hessian: Tensor,
    threshold: Tensor,
    steps: Tensor,
    counts: Tensor,
    changes: Tensor,
) -> None:
    """Choose the columns of a block anew, one after the other, given all the others.

    Args:
        gradient: `H (w - w_hat)` of the block, float32 `[columns, N]`, contiguous; at most 128 columns.
        hessian: Of the block, float32 `[columns, columns]`, contiguous.
        threshold: float32 `[columns, N]`, contiguous.
        steps: T of every column, float32 `[columns]`.
        counts: Spike counts, float32 `[columns, N]`, contiguous; replaced.
        changes: What the values of the weights changed by, float32 `[columns, N]`, written.
    """
    columns, rows = gradient.shape
    grid: Any = (triton.cdiv(rows, _ROWS),)
    with on(gradient.device):
        _refine_block[grid](
            *(gradient, hessian, threshold, steps, counts, changes),
            *(rows, columns),
            COLUMNS=COLUMNS,
            ROWS=_ROWS,
        )


if triton_available():

    @triton.jit
    def _count(charge, steps):  # type: ignore[no-untyped-def]
        """Counts of signed GIF neurons, `neurons.functional.signed_gif_count`."""
        size = tl.minimum(tl.maximum(tl.ceil(tl.abs(charge) - 0.5), 0.0), steps)
        return tl.where(charge < 0.0, -size, size)

    @triton.jit
    def _fire_block(  # type: ignore[no-untyped-def]
        weight_ptr,
        spread_ptr,
        threshold_ptr,
        count_ptr,
        error_ptr,
        rows,
        columns,
        steps,
        COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = row < rows
        tile = (column[:, None] < columns) & inside[None, :]
        weight = tl.load(weight_ptr + column[:, None] * rows + row[None, :], mask=tile, other=0.0)
        threshold = tl.load(threshold_ptr + row, mask=inside, other=1.0)
        for k in range(columns):
            own = tl.sum(tl.where(column[:, None] == k, weight, 0.0), axis=0)
            count = _count(tl.div_rn(own, threshold), steps)
            error = own - count * threshold
            later = (column < columns) & (column > k)
            spread = tl.load(spread_ptr + k * columns + column, mask=later, other=0.0)
            weight -= spread[:, None] * error[None, :]
            tl.store(count_ptr + k * rows + row, count, mask=inside)
            tl.store(error_ptr + k * rows + row, error, mask=inside)

    @triton.jit
    def _refine_block(  # type: ignore[no-untyped-def]
        gradient_ptr,
        hessian_ptr,
        threshold_ptr,
        steps_ptr,
        count_ptr,
        change_ptr,
        rows,
        columns,
        COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = row < rows
        tile = (column[:, None] < columns) & inside[None, :]
        place = column[:, None] * rows + row[None, :]
        gradient = tl.load(gradient_ptr + place, mask=tile, other=0.0)
        for k in range(columns):
            at = k * rows + row
            own = tl.sum(tl.where(column[:, None] == k, gradient, 0.0), axis=0)
            threshold = tl.load(threshold_ptr + at, mask=inside, other=1.0)
            before = tl.load(count_ptr + at, mask=inside, other=0.0)
            diagonal = tl.load(hessian_ptr + k * columns + k)
            count = _count(before + tl.div_rn(own, diagonal * threshold), tl.load(steps_ptr + k))
            change = (count - before) * threshold
            later = (column < columns) & (column > k)
            local = tl.load(hessian_ptr + k * columns + column, mask=later, other=0.0)
            gradient -= local[:, None] * change[None, :]
            tl.store(count_ptr + at, count, mask=inside)
            tl.store(change_ptr + at, change, mask=inside)
