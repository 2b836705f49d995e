"""The most likely next tokens, appended to sequences, in one Triton kernel.

Transformers' loop takes ten kernels between two forward passes: the maximum, padding, the end tokens, and one or
two for each stopping criterion. Here a program has a sequence.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on

__all__ = ["append_greedy"]

_MOST_AT_ONCE = 32768  # logits: 32 registers of a thread


def append_greedy(
    logits: Tensor,
    ids: Tensor,
    place: int,
    ended: Tensor,
    tokens: Tensor,
    pad: Tensor | None,
    ends: Tensor | None,
    barred: bool = False,
) -> None:
    """Choose the most likely token of each sequence: ``torch.argmax``, but that NaN is infinity.

    Args:
        logits: float32 ``[B, V]``, contiguous.
        ids: Sequences, int64 ``[B, L]``, contiguous; the token is written to column ``place``.
        place: Below L, not checked.
        ended: Sequences that have ended, bool ``[B]``, contiguous: they get ``pad``. Those that choose an end token
            end with it.
        tokens: int64 ``[B]``, contiguous; written, too.
        pad: int64, one element; with ``ends``.
        ends: End tokens, int64 ``[E]``, contiguous; None: there are none.
        barred: No end token is chosen, as long as another one is above minus infinity, and no sequence ends.
    """
    batch, vocabulary = logits.shape
    launch: Any = _append_greedy[(batch,)]
    block = min(triton.next_power_of_2(vocabulary), _MOST_AT_ONCE)
    with on(logits.device):
        launch(
            *(logits, ids, ended, tokens, pad, ends),
            *(vocabulary, ids.shape[1], place, int(barred)),
            ENDS=0 if ends is None else len(ends),
            BLOCK=block,
            num_warps=min(32, max(4, block // 1024)),
        )


@triton.jit(do_not_specialize=["length", "place", "barred"])
def _append_greedy(  # type: ignore[no-untyped-def]
    logits_ptr,
    ids_ptr,
    ended_ptr,
    tokens_ptr,
    pad_ptr,
    ends_ptr,
    vocabulary,
    length,
    place,
    barred,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    for first in range(0, vocabulary, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * vocabulary + i, mask=i < vocabulary, other=float("-inf"))
        x = tl.where(x == x, x, float("inf"))
        if barred != 0:
            for e in tl.static_range(ENDS):
                x = tl.where(tl.load(ends_ptr + e) == i, float("-inf"), x)
        highest, place_of = tl.max(x, 0, return_indices=True)  # the first of equal ones
        token = tl.where(highest > top, first + place_of, token)
        top = tl.maximum(top, highest)
    chosen = token.to(tl.int64)
    if ENDS > 0:
        ended = tl.load(ended_ptr + row) != 0
        chosen = tl.where(ended, tl.load(pad_ptr), chosen)
        for e in tl.static_range(ENDS):
            ended = ended | ((tl.load(ends_ptr + e) == chosen) & (barred == 0))
        tl.store(ended_ptr + row, ended)
    tl.store(ids_ptr + row * length + place, chosen)
    tl.store(tokens_ptr + row, chosen)
