"""Triton kernels of :mod:`snnllm.kernels.swiglu_triton`: product, butterflies, mixing, encoding of rows."""

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import encode_row, rounded

__all__ = ["process_rows", "silu_mul_kernel"]


@triton.jit
def _product(gate, up):  # type: ignore[no-untyped-def]
    """``silu(gate) * up`` in their dtype, rounded after SiLU and after the product."""
    g = gate.to(tl.float32)
    silu = rounded(tl.div_rn(g, 1.0 + tl.exp(-g)), gate.dtype)
    return rounded(silu.to(tl.float32) * up.to(tl.float32), gate.dtype)


@triton.jit
def silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, channels, BLOCK: tl.constexpr
):
    """A block of one row of ``silu(gate) * up``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * channels + at, _product(gate, up), mask=inside)


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x H_p`` of ROWS blocks of P, ``[ROWS * P]``, in the order of :func:`snnllm.transforms.hadamard_transform`."""
    # Sizes below 2**24: the stages are those with 2**stage < P.
    for stage in tl.static_range(24):
        if 2**stage < P:
            y = tl.reshape(x, [ROWS * (P // (2 * 2**stage)), 2, 2**stage])
            a, b = tl.split(tl.permute(y, (0, 2, 1)))
            y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
            x = tl.reshape(y, [ROWS * P])
    return x


@triton.jit
def _transform(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    out_ptr,
    order_ptr,
    sign_ptr,
    left_ptr,
    ENCODE: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Product (where rows are encoded), signs and butterflies of a group of M blocks of P channels."""
    ROWS: tl.constexpr = TILE // P if TILE > P else 1
    for first in range(0, M * P, ROWS * P):
        # One axis: of two, the gather would choose the wrong one for its neighbours.
        at = first + tl.arange(0, ROWS * P)
        inside = at < M * P
        # A hint for the layout of the gather, as in the encoder.
        channel = tl.load(order_ptr + tl.max_contiguous(at, 2), mask=inside, other=0)
        x = tl.load(gate_ptr + channel, mask=inside, other=0.0)
        if ENCODE:
            x = _product(x, tl.load(up_ptr + channel, mask=inside, other=0.0))
        x = x.to(tl.float32) * tl.load(sign_ptr + at, mask=inside, other=0).to(tl.float32)
        x = _butterflies(x, ROWS, P) * (P**-0.5)
        if M == 1:
            x *= tl.load(left_ptr)
        tl.store(out_ptr + at, x, mask=inside)


@triton.jit
def _mix(  # type: ignore[no-untyped-def]
    in_ptr, out_ptr, left_ptr, P: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr
):
    """``left^T x`` of M blocks of P channels, the sum in the order of the blocks."""
    WIDTH: tl.constexpr = P if P < TILE // 8 else TILE // 8
    MIXED: tl.constexpr = TILE // P if P < TILE // 8 else 8
    # Rows of the factor are padded, so that a thread reads its factors in one access.
    PADDED: tl.constexpr = (M + 7) // 8 * 8
    for first in range(0, M, MIXED):
        block = first + tl.arange(0, MIXED)
        for start in range(0, P, WIDTH):
            at = start + tl.arange(0, WIDTH)
            mixed = tl.zeros([MIXED, WIDTH], tl.float32)
            for other in tl.range(0, M, loop_unroll_factor=4):
                x = tl.load(in_ptr + other * P + at)
                left = tl.load(left_ptr + other * PADDED + block, mask=block < PADDED, other=0.0)
                mixed += left[:, None] * x[None, :]
            out = out_ptr + block[:, None] * P + at[None, :]
            tl.store(out, mixed, mask=(block < M)[:, None])


@triton.jit
def process_rows(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    scratch_ptr,
    rotated_ptr,
    rotation_order_ptr,
    sign_ptr,
    left_ptr,
    order_ptr,
    segment_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    rows,
    gate_stride,
    up_stride,
    channels,
    width,
    positions,
    segments,
    groups,
    P0: tl.constexpr,
    M0: tl.constexpr,
    P1: tl.constexpr,
    M1: tl.constexpr,
    TILE: tl.constexpr,
    ROTATED: tl.constexpr,
    ENCODE: tl.constexpr,
    SHARED: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows one after the other: product, rotation of up to two groups (P, M), and the encoder.

    Without ENCODE the rows of gate are rotated as they are and written to ``rotated_ptr``.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    blocks_ptr = scratch_ptr + program.to(tl.int64) * width
    own_ptr = blocks_ptr + programs.to(tl.int64) * width
    second: tl.constexpr = M0 * P0
    left_of_second: tl.constexpr = M0 * ((M0 + 7) // 8 * 8)
    for number in range(program, rows, programs):
        row = tl.full([], 0, tl.int64) + number
        gate_row = gate_ptr + row * gate_stride
        up_row = up_ptr + row * up_stride
        row_ptr = own_ptr
        if not ENCODE:
            row_ptr = rotated_ptr + row * channels
        # The scratch rows may still be read for the row before.
        tl.debug_barrier()
        if ROTATED:
            _transform(
                gate_row,
                up_row,
                row_ptr if M0 == 1 else blocks_ptr,
                rotation_order_ptr,
                sign_ptr,
                left_ptr,
                ENCODE,
                P0,
                M0,
                TILE,
            )
            if M1 > 0:
                _transform(
                    gate_row,
                    up_row,
                    (row_ptr if M1 == 1 else blocks_ptr) + second,
                    rotation_order_ptr + second,
                    sign_ptr + second,
                    left_ptr + left_of_second,
                    ENCODE,
                    P1,
                    M1,
                    TILE,
                )
            tl.debug_barrier()
            if M0 > 1:
                _mix(blocks_ptr, row_ptr, left_ptr, P0, M0, TILE)
            if M1 > 1:
                _mix(
                    blocks_ptr + second,
                    row_ptr + second,
                    left_ptr + left_of_second,
                    P1,
                    M1,
                    TILE,
                )
        else:
            for first in range(0, channels, BLOCK):
                at = first + tl.arange(0, BLOCK)
                inside = at < channels
                gate = tl.load(gate_row + at, mask=inside, other=0.0)
                up = tl.load(up_row + at, mask=inside, other=0.0)
                tl.store(row_ptr + at, _product(gate, up).to(tl.float32), mask=inside)
        if ENCODE:
            tl.debug_barrier()
            encode_row(
                row_ptr,
                row_ptr,
                1.0,
                order_ptr,
                segment_ptr,
                capacity_ptr,
                clip_ptr,
                offset_ptr,
                count_ptr + row * positions,
                threshold_ptr + row * groups,
                zero_ptr + row * groups,
                sum_ptr + row * segments,
                channels,
                positions,
                segments,
                groups,
                SHARED,
                GATHER,
                HAS_OFFSET,
                False,
                False,
                SEGMENTS,
                BLOCK,
            )
