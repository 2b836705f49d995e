"""Arithmetic of the kernels is exact where it says so: in the interpreter, and on a GPU."""

from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton (pip install triton)")

import triton
import triton.language as tl

from neurons.backends.triton_arithmetic import clipped_float, fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 1024
INF, NAN = float("inf"), float("nan")


@triton.jit
def multiply_add(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, fused(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))


@triton.jit
def clip(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, clipped_float(tl.load(x_ptr + at), 15.0).to(tl.int32))


def multiplied_and_added(*factors_and_addend: torch.Tensor) -> torch.Tensor:
    given = [tensor.to(DEVICE) for tensor in factors_and_addend]
    out = torch.empty_like(given[0])
    multiply_add[(1,)](*given, out, BLOCK=out.numel(), enable_fp_fusion=False)
    return out.cpu()


def is_rounded(result: float, exact: Fraction) -> bool:
    """Whether a float32 is the one next to an exact number, the even one of two."""
    bits = int(np.float32(result).view(np.int32))
    beside = [np.nextafter(np.float32(result), np.float32(end)) for end in (-INF, INF)]
    distance = abs(Fraction(result) - exact)
    others = [abs(Fraction(float(other)) - exact) for other in beside]
    return distance < min(others) or (distance == min(others) and bits % 2 == 0)


def hard(kind: str) -> list[torch.Tensor]:
    """Factors and addends of which two roundings make another number than one."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, SIZE, generator=generator)
    sign = torch.randint(0, 2, (SIZE,), generator=generator).float() * 2 - 1
    match kind:
        case "cancelled":  # what the product loses when it is rounded
            z = -(x * y)
        case "ties":  # products of 25 bits, the last of them one, and very little beside them
            x, y = torch.randint(2**12, 2**13, (2, SIZE), generator=generator) | 1
            keep = x * y >= 2**24
            x, y = torch.where(keep, x, 4097).float(), torch.where(keep, y, 4097).float()
            z = sign * 2.0 ** torch.randint(-140, -30, (SIZE,), generator=generator)
            z[::8] = 0.0
        case "far apart":
            z *= 2.0 ** torch.randint(-60, 60, (SIZE,), generator=generator)
        case "subnormal":
            x, y, z = x * 2.0**-70, y * 2.0**-70, z * 2.0**-140
    return [x, y, z]


@pytest.mark.parametrize("kind", ["any", "cancelled", "ties", "far apart", "subnormal"])
def test_a_fused_sum_is_rounded_once(kind):
    x, y, z = hard(kind)
    out = multiplied_and_added(x, y, z)
    for a, b, c, result in zip(*(t.tolist() for t in (x, y, z, out)), strict=True):
        assert is_rounded(result, Fraction(a) * Fraction(b) + Fraction(c)), (a, b, c)


def test_a_fused_sum_beyond_float32():
    big = torch.tensor(3e38).item()
    rows = [
        (big, 2.0, 0.0, INF),
        (big, -2.0, big, -big),
        (big, 2.0, -INF, -INF),
        (INF, 1.0, -INF, NAN),
        (INF, 0.0, 1.0, NAN),
        (NAN, 1.0, 1.0, NAN),
        (1.0, INF, 1.0, INF),
        (0.0, -1.0, 0.0, 0.0),
    ]
    *given, expected = torch.tensor(rows).T.contiguous()
    torch.testing.assert_close(
        multiplied_and_added(*given), expected, rtol=0, atol=0, equal_nan=True
    )


def test_clipping_makes_zero_of_nan():
    x = torch.tensor([NAN, -NAN, INF, -INF, -1.0, 3.0, 15.0, 16.0], device=DEVICE)
    out = torch.empty(x.shape, dtype=torch.int32, device=DEVICE)
    clip[(1,)](x, out, BLOCK=x.numel())
    assert out.tolist() == [0, 0, 15, 0, 0, 3, 15, 15]
