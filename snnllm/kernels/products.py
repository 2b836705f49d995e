"""Products of integer matrices on any device, by the backend that is there."""

from __future__ import annotations

import torch
from torch import Tensor

from snnllm.kernels import get_backend
from snnllm.kernels.exact import exact_matmul

_INT8_MAX = 127


def integer_product(a: Tensor, b: Tensor, bound_a: int, bound_b: int) -> Tensor:
    """`a @ b^T` of integer tensors `[B, H, M, D]` and `[B, H, N, D]`, exact int32 `[B, H, M, N]`.

    Args:
        a: Integers with `|a| <= bound_a`.
        b: Integers with `|b| <= bound_b`.
        bound_a: Known before the values are, so that nothing has to be read back from a device.
        bound_b: Likewise.
    """
    batch, heads, rows, dim = a.shape
    if max(bound_a, bound_b) <= _INT8_MAX and not torch.compiler.is_compiling():
        left, right = (t.to(torch.int8).reshape(batch * heads, -1, dim) for t in (a, b))
        product = get_backend("auto", a.device).int_bmm(left, right)
        return product.view(batch, heads, rows, b.shape[-2])
    return exact_matmul(a, b.mT, bound_a * bound_b * dim)  # 9-bit operands do not fit int8
