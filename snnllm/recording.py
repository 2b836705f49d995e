"""Passes of a model through static buffers: one token a sequence, or prompts padded on the right.

Nothing in a pass depends on the host: tokens, positions, the number of tokens in the cache and which of
them are padding are tensors that stay where they are. So a pass can be recorded as a CUDA graph.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from snnllm.block import CACHE_ARGUMENT

_ALIGNMENT = 8  # attention copies masks whose rows do not start at multiples of it
_SHORT, _LONG, _LIMIT = 128, 256, 1024


_CAPTURING = threading.Lock()  # one capture at a time in a process


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs of a GPU are recorded; torch's own is on the first GPU that recorded."""
    return torch.cuda.Stream(device)


def padded_length(tokens: int) -> int:
    """Tokens rounded up: to multiples of 128 up to 1024, of 256 beyond."""
    step = _SHORT if tokens <= _LIMIT else _LONG
    return -(-tokens // step) * step


class Recording:
    """Work on a GPU, recorded as a CUDA graph; a replay reads the same buffers and writes the same result.

    Args:
        work: What is recorded; it is not run.
        beside: A recording to share memory with: what one writes the other may overwrite, so only one
            runs at a time and its result is used before the other runs.

    Raises:
        RuntimeError: Something in the work waits for the device, or memory is short.
    """

    def __init__(self, work: Callable[[], Tensor], beside: Recording | None = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        before = torch.cuda.current_stream()
        own = _capture_stream(torch.cuda.current_device())
        with _CAPTURING:
            try:
                # By default a capture forbids other threads to allocate.
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=own, capture_error_mode="thread_local"
                ):
                    self._result = work()
            except BaseException:
                torch.cuda.set_stream(before)  # torch stays on the other one when a capture fails
                raise

    def replay(self) -> Tensor:
        """Run; the result is overwritten by the next replay."""
        self._graph.replay()
        return self._result


class Prompts:
    """Prompts of a padded length L: their buffers, and the recorded prefill.

    Attributes:
        tokens: `[B, L]`; those behind the prompts are hidden by the masks and overwritten in the cache.
        positions: `[B, L]`.
        recording: None until it is recorded.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.tokens = torch.zeros((batch, length), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.recording: Recording | None = None

    def set(self, tokens: Tensor, positions: Tensor) -> None:
        """Take prompts `[B, S]` and positions `[B or 1, S]`; the last of both are repeated behind them."""
        given = tokens.shape[1]
        for own, new in ((self.tokens, tokens), (self.positions, positions)):
            own[:, :given] = new
            own[:, given:] = new[:, -1:]


class Buffers:
    """What passes of a batch B read and write: the layers of a static cache, and tokens.

    Args:
        layers: Of a cache for this batch.
        batch: B.
        capacity: Tokens of the cache.
        device: Of the model.
        dtype: Likewise.

    Attributes:
        tokens: `[B, 1]`, of the next step.
        positions: `[B, 1]`, of the next step.
        length: Tokens in the cache, `[1]`.
        start: 0, `[1]`.
        seen: Whether a token may be looked at once it is written, `[B, capacity]`.
        mask: Of the tokens in the cache, as attention adds it, `[B, 1, 1, capacity]`.
        stepped: Whether a step has run.
        step: The recorded step, or None.
        prompts: By padded length, the last used ones at the end; None where one has been met once.
    """

    def __init__(
        self,
        layers: list[StaticLayer],
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layers, self.capacity = layers, capacity
        self.tokens = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._counters = torch.zeros(1 + batch, dtype=torch.int64, device=device)
        self.length, self.positions = self._counters[:1], self._counters[1:, None]
        self.start = torch.zeros_like(self.length)
        self.seen = torch.ones((batch, capacity), dtype=torch.bool, device=device)
        self.mask = self._mask(self.start, 1, dtype)
        self.stepped = False
        self.step: Recording | None = None
        self.prompts: OrderedDict[int, Prompts | None] = OrderedDict()

    def recordings(self) -> list[Recording]:
        """All that have been made."""
        found = [self.step, *(p.recording for p in self.prompts.values() if p is not None)]
        return [recording for recording in found if recording is not None]

    def clear(self, mask: Tensor, positions: Tensor) -> None:
        """Begin a generation: an empty cache, the padding of the prompts, positions of the first step.

        Args:
            mask: 1 at tokens, 0 at padding, `[B, S]` of the prompts.
            positions: `[B or 1, 1]`.
        """
        given = mask.shape[1]
        self.seen[:, :given] = mask
        self.seen[:, given:] = True  # everything counts, as far as it has been written
        self.positions.copy_(positions)
        self.length.fill_(given)
        self.mask.copy_(self._mask(self.length - 1, 1, self.mask.dtype))
        self.empty()

    def empty(self) -> None:
        """Empty the cache."""
        used = [layer for layer in self.layers if layer.is_initialized]
        if used:  # what is hidden has the weight 0, but 0 times NaN is NaN
            torch._foreach_zero_([stored for x in used for stored in (x.keys, x.values)])
            torch._foreach_zero_([layer.cumulative_length for layer in used])

    def run_step(self, model: Any, cache: StaticCache) -> Tensor:
        """Float32 logits `[B, V]` behind one more token of each sequence."""
        self.mask.index_fill_(3, self.length, 0.0)  # no prompt has padding there
        logits = self._run(
            model, cache, self.tokens, self.positions, self.length, self.mask, keep=0
        )
        self._counters.add_(1)
        return logits

    def run_prompts(self, model: Any, cache: StaticCache, prompts: Prompts) -> Tensor:
        """Float32 logits `[B, V]` behind the prompts, which then are all that the cache holds."""
        mask = self._mask(self.start, prompts.tokens.shape[1], model.dtype)
        logits = self._run(
            *(model, cache, prompts.tokens, prompts.positions, self.start, mask),
            keep=self.length - 1,
        )
        lengths = [layer.cumulative_length for layer in self.layers]
        torch._foreach_copy_(lengths, [self.length[0]] * len(lengths))
        return logits

    def _run(
        self,
        model: Any,
        cache: StaticCache,
        tokens: Tensor,
        positions: Tensor,
        first: Tensor,
        mask: Tensor,
        keep: Tensor | int,
    ) -> Tensor:
        outputs = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            cache_position=first,
            logits_to_keep=keep,
            **{CACHE_ARGUMENT: cache},
        )
        logits: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def _mask(self, first: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """0 where a token may look and a large negative number elsewhere, `[B, 1, S, capacity]`.

        Args:
            first: Place in the cache of the first of the tokens, `[1]`.
            tokens: S.
            dtype: Of the model.
        """
        batch, device = len(self.seen), self.seen.device
        rows = torch.full(
            (batch, 1, tokens, self.capacity + -self.capacity % _ALIGNMENT),
            torch.finfo(dtype).min,
            dtype=dtype,
            device=device,
        )[..., : self.capacity]
        place = first + torch.arange(tokens, device=device)
        causal = torch.arange(self.capacity, device=device) <= place[:, None]
        return rows.masked_fill_((causal & self.seen[:, None])[:, None], 0.0)


def within(layers: list[StaticLayer], batch: int, capacity: int) -> list[StaticLayer] | None:
    """Layers for a batch in the memory of others, emptied; None if they are too small."""
    if not all(layer.is_initialized for layer in layers):
        return None
    if batch * capacity > layers[0].keys.shape[0] * layers[0].keys.shape[2]:
        return None
    made = []
    for layer in layers:
        smaller = copy.copy(layer)
        smaller.batch_size, smaller.max_cache_len = batch, capacity
        smaller.cumulative_length = torch.zeros_like(layer.cumulative_length)
        for name in ("keys", "values"):
            stored: Tensor = getattr(layer, name)
            shape = (batch, stored.shape[1], capacity, stored.shape[3])
            part = stored.view(-1)[: batch * stored.shape[1] * capacity * stored.shape[3]]
            setattr(smaller, name, part.view(shape))
        made.append(smaller)
    return made
