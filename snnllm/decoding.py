"""Decoding with a static cache: one step of `generate` as a CUDA graph.

`generate(cache_implementation="static")` of transformers asks the model for a compiled forward pass
(`get_compiled_call`). Collapsed models answer with a `DecodeGraph`: nothing is compiled, one step is
recorded as it runs, and replayed for every further token. Buffers of the cache are used again by the
next call of `generate` with the same batch and length, so that the recorded step stays valid.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from snnllm.block import CACHE_ARGUMENT
from snnllm.linear import SpikingLinear

_TENSORS = ("input_ids", "position_ids", "attention_mask")


class DecodeGraph:
    """The forward pass of one token a sequence, recorded once and replayed.

    The first call with a cache runs as it is (kernels compile, libraries set up), the second records.
    Calls that cannot be recorded, such as those that ask for hidden states, run as they are.

    Args:
        model: The causal LLaMA.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forget()

    def _forget(self) -> None:
        """Drop the recorded step and its cache."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cache: weakref.ref[Cache] | None = None
        self._layers: list[Any] = []
        self._buffers: list[Tensor] = []
        self._key: tuple[Any, ...] = ()
        self._inputs: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._weights: tuple[Any, ...] = ()
        self._moves = False

    def __getstate__(self) -> dict[str, Any]:
        """The model alone, for deepcopy and pickle."""
        return {"_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_model"])  # type: ignore[misc]

    def begin(self, cache: Any, batch: int) -> None:
        """Meet the empty cache of a new generation: give it the buffers of the last one, if they fit."""
        if self._graph is None:
            return
        alive = self._cache is not None and self._cache() is not None
        fits = (
            not alive
            and type(cache) is StaticCache
            and self._weights == weights_state(self._model)
            and self._inputs["input_ids"].shape[0] == batch
            and len(cache.layers) == len(self._layers)
            and all(
                type(new) is type(old)
                and not new.is_initialized
                and new.max_cache_len == old.max_cache_len
                for new, old in zip(cache.layers, self._layers, strict=True)
            )
        )
        if not fits:
            self._forget()
            return
        for layer in self._layers:
            layer.reset()
        cache.layers[:] = self._layers
        self._cache = weakref.ref(cache)

    def __call__(self, **inputs: Any) -> Any:
        """The outputs of `model(**inputs)`; the logits are overwritten by the next call."""
        cache = inputs.get(CACHE_ARGUMENT)
        tensors = {n: inputs[n] for n in _TENSORS if isinstance(inputs.get(n), Tensor)}
        others = {n: v for n, v in inputs.items() if n not in tensors and n != CACHE_ARGUMENT}
        plain = all(v is None or isinstance(v, bool | int) for v in others.values())
        asked = any(v for n, v in others.items() if n.startswith("output_"))
        one = type(cache) is StaticCache and inputs["input_ids"].shape[1] == 1
        if not one or not plain or asked or torch.is_grad_enabled() or not others["return_dict"]:
            return self._model(**inputs)
        tensors = _of_full_length(tensors, cache.layers[0].max_cache_len)
        key = (tuple((n, t.shape, t.dtype) for n, t in tensors.items()), tuple(others.items()))
        if self._cache is None or self._cache() is not cache or self._key != key:
            self._forget()
            self._cache, self._key = weakref.ref(cache), key
            return self._model(**inputs)
        if self._graph is not None and not _same(self._buffers, _buffers_of(cache.layers)):
            self._graph, self._moves = None, True  # as beam search does
        if self._moves:
            return self._model(**inputs)
        if self._graph is None:
            self._record(cache, tensors, others)
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor)
        assert self._graph is not None  # just recorded
        self._graph.replay()
        return CausalLMOutputWithPast(logits=self._logits, **{CACHE_ARGUMENT: cache})

    def _record(self, cache: Cache, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
        self._inputs = {n: t.clone() for n, t in tensors.items()}
        self._weights = weights_state(self._model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._model(**self._inputs, **others, **{CACHE_ARGUMENT: cache})
        self._logits = output.logits
        # Not the cache itself: once nobody else holds it, its buffers are free for the next one.
        self._layers, self._buffers = list(cache.layers), _buffers_of(cache.layers)
        self._graph = graph


def _buffers_of(layers: list[Any]) -> list[Tensor]:
    """The tensors that layers of a cache read and write."""
    return [v for layer in layers for v in vars(layer).values() if isinstance(v, Tensor)]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _of_full_length(tensors: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Inputs whose shapes do not change from step to step: a 2-D mask as long as the cache.

    What it says of positions beyond the present one does not matter: the causal mask hides them.
    """
    mask = tensors.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return tensors
    full = nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
    return {**tensors, "attention_mask": full}


def weights_state(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a recorded step of the model is stale: other weights, another view."""
    parameters = tuple((p.data_ptr(), p.dtype) for p in model.parameters())
    linears = tuple(
        (m.version, m.view, m.backend) for m in model.modules() if isinstance(m, SpikingLinear)
    )
    return parameters, linears
