"""Greedy decoding and sampling of `generate` with a static cache: a step is a CUDA graph.

`transformers` compiles the forward pass and waits for the device after every token. Here nothing is
compiled: the second step is recorded as it runs and replayed from then on, with masks and positions
kept on the device; and whether all sequences have ended is read one step late, so that the device
never waits for the program. Buffers of the cache serve the next call of `generate` with the same batch
and length, so that the recorded step stays valid.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache

from neurons import SpikeEncoder
from snnllm.block import CACHE_ARGUMENT, prepare
from snnllm.execution import SpikingModule
from snnllm.linear import SpikingLinear
from snnllm.shared_input import hooked

_log = logging.getLogger(__name__)
_ALIGNMENT = 8  # attention copies masks whose rows do not start at multiples of it


def records_on(device: torch.device) -> bool:
    """Whether steps on a device can be recorded."""
    return device.type == "cuda"


class DecodeSteps:
    """Forward passes of one token a sequence: the first runs as it is, the second is recorded.

    They belong to one model, which is passed in: whoever drops the model has its memory back at once.

    Attributes:
        lock: Held by the thread that generates; the buffers are those of one generation at a time.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._state: tuple[Any, ...] = ()  # of the model that a recorded step belongs to
        self._forget()

    def _forget(self) -> None:
        """Drop the recorded step and its cache."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cache: weakref.ref[Cache] | None = None
        self._layers: list[Any] = []
        self._steps, self._records = 0, False
        self._tokens = self._positions = self._length = self._seen = torch.empty(0)
        self._logits = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model starts anew, by deepcopy and pickle."""
        return DecodeSteps, ()

    def ready(self, model: Any) -> bool:
        """Whether the steps of a model can be recorded; packs its weights, and notes its state.

        All linears must run in operators of Triton, and nobody watch: a replayed step calls no hooks.
        """
        parameters, linears, views = [], [], []
        for module in model.modules():
            if hooked(module) or (isinstance(module, SpikeEncoder) and module.watched):
                return False
            parameters += [
                (p.data_ptr(), p.dtype) for p in module._parameters.values() if p is not None
            ]
            if isinstance(module, SpikingModule):
                views.append(module.view)
            if isinstance(module, SpikingLinear):
                linears.append(module)
        if not linears or not all(linear.runs_in_triton() for linear in linears):
            return False
        state = (
            parameters,
            [(linear.version, linear.backend) for linear in linears],
            views,
            model.config._attn_implementation,
        )
        if state != self._state:
            self._forget()
            prepare(model)
            self._state = state
        return True

    def begin(self, cache: StaticCache, mask: Tensor, positions: Tensor) -> None:
        """Meet the empty cache of a new generation: give it the buffers of the last one, if they fit.

        Args:
            cache: Empty.
            mask: 1 at tokens, 0 at padding, `[B, S]` of the prompts.
            positions: Of the first new tokens, `[B or 1, 1]`.
        """
        free = self._cache is None or self._cache() is None
        # Tensors of the inference mode cannot be written outside of it.
        writable = torch.is_inference_mode_enabled() or not self._tokens.is_inference()
        fits = (
            self._graph is not None
            and free
            and writable
            and len(self._tokens) == len(mask)
            and len(cache.layers) == len(self._layers)
            and all(
                type(new) is type(old) and new.max_cache_len == old.max_cache_len
                for new, old in zip(cache.layers, self._layers, strict=True)
            )
        )
        if fits:
            for layer in self._layers:
                layer.reset()
            cache.layers[:] = self._layers
        else:
            self._forget()
            self._layers = list(cache.layers)
            self._make_inputs(mask, cache.layers[0].max_cache_len)
        self._cache = weakref.ref(cache)
        # Beyond the prompts everything counts, as far as it has been written.
        self._seen[:, : mask.shape[1]] = mask.bool()
        self._seen[:, mask.shape[1] :] = True
        self._positions.copy_(positions)
        self._length.fill_(mask.shape[1])

    def _make_inputs(self, mask: Tensor, capacity: int) -> None:
        batch, device = len(mask), mask.device
        self._records = records_on(device)
        self._tokens = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._length = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.ones((batch, capacity), dtype=torch.bool, device=device)

    def __call__(self, model: Any, tokens: Tensor) -> Tensor:
        """Float32 logits `[B, V]` behind tokens `[B]`; overwritten by the next call."""
        self._tokens.copy_(tokens.unsqueeze(1))
        if self._steps == 1 and self._records:
            self._record(model)
        self._steps += 1
        if self._graph is None:
            return self._forward(model)
        self._graph.replay()
        return self._logits

    def _record(self, model: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._logits = self._forward(model)
        except RuntimeError as error:
            # Something waits for the device: it runs without a graph, which is slower.
            _log.warning("decoding is not recorded as a CUDA graph: %s", error)
            self._records = False
            return
        self._graph = graph

    def _forward(self, model: Any) -> Tensor:
        cache = None if self._cache is None else self._cache()
        assert cache is not None  # `sample` holds it
        outputs = model(
            input_ids=self._tokens,
            attention_mask=self._mask(model.dtype),
            position_ids=self._positions,
            use_cache=True,
            return_dict=True,
            cache_position=self._length,
            **{CACHE_ARGUMENT: cache},
        )
        self._positions.add_(1)
        self._length.add_(1)
        logits: Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
        return logits

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a token may look and a large negative number elsewhere, `[B, 1, 1, capacity]`."""
        batch, capacity = self._seen.shape
        index = torch.arange(capacity, device=self._seen.device)
        rows = torch.full(
            (batch, 1, 1, capacity + -capacity % _ALIGNMENT),
            torch.finfo(dtype).min,
            dtype=dtype,
            device=self._seen.device,
        )[..., :capacity]
        return rows.masked_fill_(((index <= self._length) & self._seen)[:, None, None], 0.0)


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
    steps.begin(
        model_kwargs[CACHE_ARGUMENT],
        torch.ones_like(input_ids) if mask is None else mask,
        model_kwargs["position_ids"][:, -1:] + 1,
    )
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1].to(torch.float32, copy=True)
    del outputs
    finished = _LateFlag(input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            probability = nn.functional.softmax(scores, dim=-1)
            tokens = torch.multinomial(probability, num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        full = input_ids.shape[1] >= stopping_criteria.max_length
        if streamer is not None:  # which waits for every token anyway
            streamer.put(tokens.cpu())
            if full or not bool(unfinished.any()):
                streamer.end()
                return input_ids
        elif finished.before(~unfinished.any()):
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
