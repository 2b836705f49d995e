"""The GPTQ column sweep for any quantiser: columns in order, errors spread over the columns behind.

Frantar et al., GPTQ (arXiv 2210.17323). What a column is rounded to is decided by a `BlockCoder`, which
sees the compensated weights of a block before its first column is rounded: ternary spikes
(`snnllm.ternary`), binary weights (`snnllm.baselines`) and uniform levels run in the same loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

LAZY_COLUMNS = 128
"""Columns whose effect on the columns behind is one matmul."""
CPU_LAZY_COLUMNS = 32
"""The same on the CPU, where the matmul is much faster than the rank-one updates."""


class BlockCoder(ABC):
    """Rounds the columns of a weight, block by block."""

    @abstractmethod
    def begin(self, weight: Tensor, start: int) -> None:
        """Choose the parameters of a block.

        Args:
            weight: Its compensated weights, float32 `[columns, N]`.
            start: Position of its first column in the sweep.
        """

    @abstractmethod
    def round(self, column: int, weight: Tensor) -> Tensor:
        """Round a column of the current block.

        Args:
            column: Position in the block.
            weight: Its compensated weights, float32 `[N]`.

        Returns:
            The value that stands for each weight, float32 `[N]`.
        """

    def round_columns(self, column: int, weight: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Round several columns of the current block, each with the errors of those before it.

        Args:
            column: Position of the first one in the block.
            weight: Their compensated weights, float32 `[columns, N]`, contiguous; changed in place.
            spread: `U_kj / U_kk` of these columns, `[columns, columns]`, contiguous.

        Returns:
            The values that stand for the weights, and `w_k - w_hat_k`, each float32 `[columns, N]`.
        """
        values, errors = torch.empty_like(weight), torch.empty_like(weight)
        for k, error in enumerate(errors):
            values[k] = self.round(column + k, weight[k])
            torch.sub(weight[k], values[k], out=error)
            weight[k + 1 :].addr_(spread[k, k + 1 :], error, alpha=-1.0)
        return values, errors


def column_sweep(weight: Tensor, upper: Tensor, coder: BlockCoder, blocks: Sequence[int]) -> Tensor:
    """Round all columns, `w_j -= e U_kj` with `e = (w_k - w_hat_k) / U_kk` for every `j > k`.

    Nothing is read back from the device.

    Args:
        weight: float32 `[N, K]`, columns in the order of the sweep.
        upper: Upper Cholesky factor of the inverse Hessian in that order, `[K, K]`
            (`gptq.inverse_factor`).
        coder: Rounds the columns.
        blocks: Sizes of the blocks of `coder`; they sum to `K`.

    Returns:
        The rounded weight, float32 `[N, K]`.

    Raises:
        ValueError: The blocks do not cover the columns.
    """
    w = weight.float().T.clone(memory_format=torch.contiguous_format)  # a column is contiguous
    if sum(blocks) != len(w):
        raise ValueError(f"blocks {tuple(blocks)} do not sum to {len(w)} columns.")
    rounded, lazy = torch.empty_like(w), LAZY_COLUMNS if w.is_cuda else CPU_LAZY_COLUMNS
    begin = 0
    for size in blocks:
        coder.begin(w[begin : begin + size], begin)
        for start in range(begin, begin + size, lazy):
            part = slice(start, min(start + lazy, begin + size))
            local = upper[part, part]
            spread = (local / local.diagonal().unsqueeze(1)).contiguous()
            rounded[part], errors = coder.round_columns(start - begin, w[part], spread)
            behind = upper[part, part.stop :] / local.diagonal().unsqueeze(1)
            w[part.stop :].addmm_(behind.T, errors, alpha=-1.0)
        begin += size
    return rounded.T.contiguous()
