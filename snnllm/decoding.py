"""Passes of `generate` with a static cache, its default: prefill and step are CUDA graphs.

`transformers` compiles the forward pass and waits for the device after every token. Here nothing is
compiled: the second step is recorded as it runs and replayed from then on, with masks and positions
kept on the device. The host needs longer to launch a prefill than the device needs to run it, so
prompts are recorded too, padded on the right to a few lengths (`recording.padded_length`). `snnllm.sampling` has
the loop that chooses tokens.

Graphs are valid for the buffers that they were recorded with. These serve the next calls of `generate`: a
cache has a few more tokens than asked for, so that calls of similar length share one, and smaller ones lie in
the memory of the largest. What stays allocated is that cache and the activations of the largest graph,
which all graphs share; prompts for which that is much run without (`MOST_TOKENS`, `_MOST_PAIRS`, `_MOST_SCORES`).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from snnllm.attention import SpikingLlamaAttention
from snnllm.block import prepare
from snnllm.model_state import ModelState
from snnllm.recording import Buffers, Prompts, Recording, padded_length, within

_log = logging.getLogger(__name__)
_KEPT_BUFFERS = 4  # batches and capacities that are remembered
_KEPT_PROMPTS = 8  # lengths of prompts for each of them
MOST_TOKENS = 8192  # of a recorded prefill, in all prompts; of a cache that nobody has asked for
_MOST_PAIRS = 1 << 27  # of tokens and places in the cache: the mask of a recorded prefill
_MOST_SCORES = 1 << 26  # of all heads, where attention has them in memory at once


def records_on(device: torch.device) -> bool:
    """Whether passes on a device can be recorded."""
    return device.type == "cuda"


def static_cache(
    model: Any, config: Any, cache: Any, batch: int, length: int, observers: Iterable[Any]
) -> StaticCache | None:
    """The static cache of a generation: the one that transformers made, or one instead of a growing one.

    Args:
        model: That generates.
        config: Of the generation.
        cache: Which transformers found or made.
        batch: B.
        length: Tokens that a sequence has at most, more than its prompt; the last one is in no cache.
        observers: Processors and criteria. Our loop calls them once more behind the end, for which those of
            transformers do not care.

    Returns:
        An empty cache of nobody else; None if the caller has to have the other one. The memory of a cache is kept for
        the next generation, so a large one has to be asked for.
    """
    if type(cache) not in (StaticCache, DynamicCache) or cache.offloading:
        return None
    if getattr(cache, "_is_user_defined", False):
        return None
    if type(cache) is StaticCache:
        empty = all(type(x) is StaticLayer and not x.is_initialized for x in cache.layers)
        return cache if empty and length <= cache.layers[0].max_cache_len + 1 else None
    tokens = batch * padded_length(length - 1)
    if (
        config.cache_implementation is not None
        or config.prefill_chunk_size is not None
        or cache.get_seq_length() > 0
        or not all(type(x).__module__.startswith("transformers.") for x in observers)
        or tokens > MOST_TOKENS
        or not _has_memory(model, tokens)
    ):
        return None
    return StaticCache(config=model.config, max_cache_len=length - 1)


def _has_memory(model: Any, tokens: int) -> bool:
    """Whether a cache of so many tokens takes at most half of the free memory of a GPU."""
    if model.device.type != "cuda":
        return True
    config = model.config
    heads = config.num_key_value_heads * config.num_hidden_layers
    size = 2 * tokens * heads * config.head_dim * model.dtype.itemsize  # encoded ones have less
    own = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free: int = torch.cuda.mem_get_info(model.device)[0] + own
    return bool(2 * size <= free)


class DecodeSteps:
    """Passes of `generate` of one model: the first of a size runs as it is, the second is recorded.

    The model is passed in: whoever drops it has its memory back at once.

    Attributes:
        lock: Held by the thread that generates; the buffers are those of one generation at a time.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._state = ModelState()
        self._refused: set[str] = set()  # what could not be recorded
        self._forget()

    def _forget(self) -> None:
        """Drop what was recorded and its buffers."""
        self._known: OrderedDict[tuple[int, int], Buffers] = OrderedDict()
        self._largest: list[StaticLayer] = []
        self._buffers: Buffers | None = None  # of the present generation
        self._cache: weakref.ref[Cache] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model starts anew, by deepcopy and pickle."""
        return DecodeSteps, ()

    def ready(self, model: Any) -> bool:
        """Whether passes of a model can be recorded (`ModelState`); packs the weights of a changed one."""
        changed = self._state.changed(model)
        if changed:
            self._forget()
            self._refused.clear()
            prepare(model)
        return changed is not None

    def begin(
        self, cache: StaticCache, mask: Tensor, positions: Tensor, dtype: torch.dtype
    ) -> None:
        """Meet the empty cache of a new generation: give it buffers of an earlier one, if some fit.

        Args:
            cache: Empty; its layers are replaced, or enlarged to a length that others share.
            mask: 1 at tokens, 0 at padding, `[B, S]` of the prompts.
            positions: Of the first new tokens, `[B or 1, 1]`.
            dtype: Of the model.
        """
        free = self._cache is None or self._cache() is None
        # Tensors of the inference mode cannot be written outside of it.
        writable = torch.is_inference_mode_enabled() or not any(
            known.tokens.is_inference() for known in self._known.values()
        )
        if not free or not writable:
            self._forget()
        key = len(mask), padded_length(cache.layers[0].max_cache_len)
        buffers = self._known.pop(key, None)
        if buffers is None:
            buffers = self._make(cache, *key, mask.device, dtype)
        self._known[key] = self._buffers = buffers
        if len(self._known) > _KEPT_BUFFERS:
            self._known.popitem(last=False)
        cache.layers[:] = buffers.layers
        self._cache = weakref.ref(cache)
        buffers.clear(mask, positions)

    def _make(
        self,
        cache: StaticCache,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Buffers:
        layers = within(self._largest, batch, capacity) if self._largest else None
        if layers is None:
            self._forget()
            layers = self._largest = list(cache.layers)
            for layer in layers:
                layer.max_cache_len = capacity
        return Buffers(layers, batch, capacity, device, dtype)

    def prefill(self, model: Any, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Float32 logits `[B, V]` behind prompts; None if transformers' prefill has to run.

        Args:
            model: As `ready` found it.
            tokens: `[B, S]`, what the cache of `begin` is for.
            positions: `[B or 1, S]`.
        """
        buffers, _ = self._present()
        batch, length = len(tokens), padded_length(tokens.shape[1])
        if not self._records_prompts(model, buffers, batch, length):
            return None
        if length not in buffers.prompts:
            buffers.prompts[length] = None
            if len(buffers.prompts) > _KEPT_PROMPTS:
                buffers.prompts.popitem(last=False)
            return None
        buffers.prompts.move_to_end(length)
        prompts = buffers.prompts[length]
        if prompts is None:
            with torch.inference_mode(False):  # to be written outside of it, too
                prompts = Prompts(batch, length, tokens.device)
            buffers.prompts[length] = prompts
        prompts.set(tokens, positions)
        if prompts.recording is not None:
            return prompts.recording.replay()
        # Once as it is: kernels are compiled now, and none while it is recorded.
        work = partial(self._run_prompts, model, prompts)
        try:
            logits = work()
        except torch.OutOfMemoryError as error:
            _log.warning("prompts are not padded to %d tokens: %s", length, error)
            self._refused.add("the prefill")
            buffers.prompts.clear()
            buffers.empty()
            return None
        prompts.recording = self._record("the prefill", work)
        return logits

    def _run_prompts(self, model: Any, prompts: Prompts) -> Tensor:
        buffers, cache = self._present()
        return buffers.run_prompts(model, cache, prompts)

    def _records_prompts(self, model: Any, buffers: Buffers, batch: int, length: int) -> bool:
        """Whether a prefill may be recorded, and the memory of its activations be kept."""
        if "the prefill" in self._refused or not records_on(buffers.tokens.device):
            return False
        attention, heads = model.model.layers[0].self_attn, model.config.num_attention_heads
        scores = model.config._attn_implementation == "eager" or (
            isinstance(attention, SpikingLlamaAttention) and attention.kernels() is None
        )
        pairs = batch * length * buffers.capacity  # of the mask
        return (
            batch * length <= MOST_TOKENS
            and pairs <= _MOST_PAIRS
            and not (scores and heads * pairs > _MOST_SCORES)
        )

    @property
    def tokens(self) -> Tensor:
        """What the next step takes, int64 `[B]`, to be written."""
        return self._present()[0].tokens[:, 0]

    def __call__(self, model: Any) -> Tensor:
        """Float32 logits `[B, V]` behind `tokens`; overwritten by the next call."""
        buffers, _ = self._present()
        records = records_on(buffers.tokens.device) and "decoding" not in self._refused
        work = partial(self._run_step, model)
        if buffers.step is None and buffers.stepped and records:
            buffers.step = self._record("decoding", work)
        buffers.stepped = True
        return work() if buffers.step is None else buffers.step.replay()

    def _run_step(self, model: Any) -> Tensor:
        buffers, cache = self._present()
        return buffers.run_step(model, cache)

    def _record(self, name: str, work: Callable[[], Tensor]) -> Recording | None:
        others = [made for known in self._known.values() for made in known.recordings()]
        try:
            return Recording(work, others[0] if others else None)
        except RuntimeError as error:
            # Something waits for the device: it runs without a graph, which is slower.
            _log.warning("%s is not recorded as a CUDA graph: %s", name, error)
            self._refused.add(name)
            return None

    def _present(self) -> tuple[Buffers, Any]:
        """Buffers and cache of the generation that runs."""
        cache = None if self._cache is None else self._cache()
        assert self._buffers is not None
        assert cache is not None  # `sample` holds it
        return self._buffers, cache
