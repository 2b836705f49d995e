"""Integer products by float matmuls, exact whatever torch has been told about precision.

A float matmul of integers is exact, in any order of summation, while every partial sum fits the
mantissa. Two settings of torch would break that silently: autocast casts float32 operands to half
precision, and the matmul precision allows bfloat16 or TF32 inside of a float32 matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_FLOAT32 = 1 << 24


def exact_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """`a @ b` of integers in any dtype, as int32.

    Args:
        a: `[..., M, K]`.
        b: `[..., K, N]`.
        bound: At least the sum of the `|products|` of any entry; below `2**31`. Known before the
            values are, so that nothing has to be read back from a device.

    Returns:
        int32 `[..., M, N]`.
    """
    dtype = exact_dtype(bound, a.device)
    left, right = a.to(dtype), b.to(dtype)
    kind = a.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return torch.matmul(left, right).to(torch.int32)
    return torch.matmul(left, right).to(torch.int32)


@torch.compiler.assume_constant_result  # dynamo of torch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def exact_dtype(bound: int, device: torch.device) -> torch.dtype:
    """The cheapest float type whose matmul of integers with sums up to `bound` is exact."""
    if bound <= _EXACT_FLOAT32 and device.type == "cpu" and _full_precision():
        return torch.float32
    return torch.float64  # no setting lowers it; on other devices float32 may be emulated, too


def _full_precision() -> bool:
    """Whether torch must not lower float32 matmuls to bfloat16 or TF32."""
    if torch.compiler.is_compiling():  # the setting cannot be read, and may differ at run time
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # somebody set the precision of a single backend, torch will not say which
        return False
