"""Greedy decoding and sampling of `generate` with a static cache, its default: prefill and step are CUDA graphs.

`transformers` compiles the forward pass and waits for the device after every token. Here nothing is
compiled: the second step is recorded as it runs and replayed from then on, with masks and positions
kept on the device; and whether all sequences have ended is read one step late, so that the device
never waits for the program. The host needs longer to launch a prefill than the device needs to run it, so
prompts are recorded too, padded on the right to a few lengths (`recording.padded_length`).

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
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from snnllm.attention import SpikingLlamaAttention
from snnllm.block import CACHE_ARGUMENT, prepare
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
        length: Tokens that a sequence has at most; the last one is in no cache.
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

    def begin(self, cache: StaticCache, mask: Tensor, positions: Tensor) -> None:
        """Meet the empty cache of a new generation: give it buffers of an earlier one, if some fit.

        Args:
            cache: Empty; its layers are replaced, or enlarged to a length that others share.
            mask: 1 at tokens, 0 at padding, `[B, S]` of the prompts.
            positions: Of the first new tokens, `[B or 1, 1]`.
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
            buffers = self._make(cache, *key, mask.device)
        self._known[key] = self._buffers = buffers
        if len(self._known) > _KEPT_BUFFERS:
            self._known.popitem(last=False)
        cache.layers[:] = buffers.layers
        self._cache = weakref.ref(cache)
        buffers.clear(mask, positions)

    def _make(self, cache: StaticCache, batch: int, capacity: int, device: torch.device) -> Buffers:
        layers = within(self._largest, batch, capacity) if self._largest else None
        if layers is None:
            self._forget()
            layers = self._largest = list(cache.layers)
            for layer in layers:
                layer.max_cache_len = capacity
        return Buffers(layers, batch, capacity, device)

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

    def __call__(self, model: Any, tokens: Tensor) -> Tensor:
        """Float32 logits `[B, V]` behind tokens `[B]`; overwritten by the next call."""
        buffers, _ = self._present()
        buffers.tokens.copy_(tokens.unsqueeze(1))
        records = records_on(tokens.device) and "decoding" not in self._refused
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


def sample(
    model: Any,
    steps: DecodeSteps,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Greedy decoding or sampling; the tokens that `GenerationMixin._sample` makes.

    Returns:
        Prompts and new tokens, `[B, S + new]`.
    """
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs["position_ids"]
    steps.begin(
        model_kwargs[CACHE_ARGUMENT],
        torch.ones_like(input_ids) if mask is None else mask,
        positions[:, -1:] + 1,
    )
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    logits = None
    if generation_config.prefill_chunk_size is None:
        logits = steps.prefill(model, input_ids, positions)
    if logits is None:
        outputs = model._prefill(
            input_ids, generation_config, model_kwargs, is_first_iteration=True
        )
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        del outputs
    finished = _LateFlag(input_ids.device)
    while True:
        if logits_processor:  # one may keep them, and the next step writes to the same memory
            logits = logits.clone()
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            probability = nn.functional.softmax(scores, dim=-1)
            tokens = torch.multinomial(probability, num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = torch.where(ended, pad, tokens)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        ended = ended | stopping_criteria(input_ids, None)
        full = input_ids.shape[1] >= stopping_criteria.max_length
        if streamer is not None:  # which waits for every token anyway
            streamer.put(tokens.cpu())
            if full or bool(ended.all()):
                streamer.end()
                return input_ids
        elif finished.before(ended.all()):
            return input_ids[:, :-1]
        elif full:
            return input_ids
        logits = steps(model, tokens)


class _LateFlag:
    """A flag on a device, read one step late without waiting for the present step."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._values = [torch.zeros((), dtype=torch.bool, pin_memory=cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._step = 0

    def before(self, flag: Tensor) -> bool:
        """Remember the flag of this step; return that of the step before, False at the first."""
        now, last = self._step % 2, (self._step + 1) % 2
        self._values[now].copy_(flag, non_blocking=True)
        copied, earlier = self._copied[now], self._copied[last]
        if copied is not None:
            copied.record()
        self._step += 1
        if self._step == 1:
            return False
        if earlier is not None:
            earlier.synchronize()
        return bool(self._values[last])
