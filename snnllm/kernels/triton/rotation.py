"""Hadamard blocks in Triton, as :class:`snnllm.hadamard.OnlineRotation` has them.

A thread loads 16 neighbours and mixes them in registers; one exchange through shared memory brings
those together that are 16 apart in a block, and a second pass of butterflies ends the block of 256.
From then on every thread has neighbours again, in the order of
:func:`snnllm.hadamard.rotate_block`: range, counts and stores need no other exchange.
"""

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import gated, read

__all__ = ["rotate_kernel", "rotated_tile"]


@triton.jit
def _front(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    MANY: tl.constexpr,
    RADIX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
):
    """The first WIDTH of every RADIX channels, float32 ``[ROWS, WIDTH]``; 0 from channel MANY on."""
    first = tl.arange(0, ROWS)[:, None] * RADIX
    at = first + tl.arange(0, WIDTH)[None, :]
    inside = tl.broadcast_to(first < MANY, [ROWS, WIDTH])
    MASKED: tl.constexpr = MANY < ROWS * RADIX
    x = read(gate_ptr, at, inside, MASKED)
    if GATED:
        x = gated(x, read(up_ptr, at, inside, MASKED))
    return x.to(tl.float32)


@triton.jit
def _mix_neighbours(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Butterflies along the last axis of ``[ROWS, WIDTH]``: a pass brings the next bit to the end."""
    for stage in tl.static_range(4):
        if 2**stage < WIDTH:
            a, b = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, WIDTH])
    return x


@triton.jit
def _mix_rows(x, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Butterflies along the first axis of ``[WIDTH, ROWS]``, which a thread holds by default."""
    for stage in tl.static_range(4):
        if 2**stage < WIDTH:
            pairs = tl.permute(tl.reshape(x, [WIDTH // 2, 2, ROWS]), (0, 2, 1))
            a, b = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (2, 0, 1)), [WIDTH, ROWS])
    return x


@triton.jit
def rotated_tile(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    MANY: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    GATED: tl.constexpr,
):
    """A tile of blocks of P channels times H_P: float32 in order, ``[TILE / W, W]``, W neighbours."""
    RADIX: tl.constexpr = P if P < 16 else 16
    # A load gives a thread 8 neighbours at most.
    WIDTH: tl.constexpr = RADIX if RADIX < 8 else 8
    ROWS: tl.constexpr = TILE // RADIX
    x = _front(gate_ptr, up_ptr, MANY, RADIX, ROWS, WIDTH, GATED)
    x = _mix_neighbours(x, ROWS, WIDTH)
    if RADIX > WIDTH:
        y = _front(gate_ptr + WIDTH, up_ptr + WIDTH, MANY, RADIX, ROWS, WIDTH, GATED)
        y = _mix_neighbours(y, ROWS, WIDTH)
        x = tl.reshape(tl.permute(tl.join(x + y, x - y), (0, 2, 1)), [ROWS, RADIX])
    if P > RADIX:
        REST: tl.constexpr = P // RADIX
        x = tl.permute(tl.reshape(x, [TILE // P, REST, RADIX]), (1, 0, 2))
        x = _mix_rows(tl.reshape(x, [REST, TILE // REST]), REST, TILE // REST)
        x = tl.permute(x, (1, 0))
    return x


@triton.jit
def rotate_kernel(x_ptr, out_ptr, stride, channels, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate a row; PIECES, flat, are those of :func:`snnllm.kernels.triton.swiglu.pieces_of`."""
    row = tl.program_id(0).to(tl.int64)
    for piece in tl.static_range(len(PIECES) // 5):
        _rotate_piece(
            *(
                x_ptr + row * stride + PIECES[5 * piece],
                out_ptr + row * channels + PIECES[5 * piece],
            ),
            *(PIECES[5 * piece + 1], PIECES[5 * piece + 2], PIECES[5 * piece + 3]),
        )


@triton.jit
def _rotate_piece(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, MANY: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr
):
    at = tl.arange(0, TILE)
    for first in tl.static_range(0, MANY, TILE):
        x = rotated_tile(x_ptr + first, x_ptr + first, MANY - first, P, TILE, False)
        x = tl.reshape(x, [TILE]) * (P**-0.5)
        tl.store(out_ptr + first + at, x, mask=first + at < MANY)
