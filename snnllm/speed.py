"""How fast models prefill and decode, side by side in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contender", "Timing", "decode", "generate", "prefill", "time_contenders"]


@dataclass(frozen=True)
class Contender:
    """Something that generates.

    Attributes:
        model: A causal language model of transformers.
        using: Makes the context in which it runs, such as a view.
        options: Further arguments of its `generate`, such as `cache_implementation`.
    """

    model: Any
    using: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Medians over the repetitions.

    Attributes:
        prefill_seconds: From the prompt to the first token.
        decode_seconds: Of one more token.
        repetitions: How many were timed.
    """

    prefill_seconds: float
    decode_seconds: float
    repetitions: int


def generate(model: Any, ids: Tensor, tokens: int, **options: Any) -> float:
    """Seconds of greedy generation of `tokens` tokens after the prompts `ids: [B, S]`.

    Args:
        model: A causal language model of transformers.
        ids: Prompts without padding.
        tokens: New tokens of each.
        options: Further arguments of its `generate`.
    """
    ids = ids.to(model.device)
    _finish(ids)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    _finish(ids)
    return time.perf_counter() - start


def _finish(tensor: Tensor) -> None:
    """Wait for the accelerator, which runs behind the program."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def prefill(model: Any, ids: Tensor, **options: Any) -> float:
    """Seconds to the first token."""
    return generate(model, ids, 1, **options)


def decode(model: Any, ids: Tensor, tokens: int, **options: Any) -> float:
    """Seconds a step of decoding, the prompt taken off."""
    long, short = (generate(model, ids, count, **options) for count in (tokens + 1, 1))
    return (long - short) / tokens


def time_contenders(
    contenders: Mapping[str, Contender],
    prompt: Tensor,
    context: Tensor,
    tokens: int,
    repeat: int,
    patience: float = math.inf,
) -> dict[str, Timing]:
    """Time every contender, interleaved so that a busy machine troubles all of them alike.

    Args:
        contenders: What to time, by name.
        prompt: Ids of the prefill, `[B, S]`.
        context: Ids before the decoded tokens, `[B, S']`.
        tokens: Decoded tokens of a repetition.
        repeat: Repetitions, at least 1; one more warms up, and on a GPU, where prefills are recorded then, another one.
        patience: Seconds after which a contender is not repeated any more. If warming up alone takes so
            long, it is timed once, over a quarter of the tokens.

    Returns:
        The medians by name.

    Raises:
        ValueError: `tokens` or `repeat` is below 1.
    """
    if tokens < 1 or repeat < 1:
        raise ValueError(f"tokens and repeat must be at least 1, got {tokens} and {repeat}.")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    used = dict.fromkeys(contenders, 0.0)
    warm_ups = 2 if any(c.model.device.type == "cuda" for c in contenders.values()) else 1
    for repetition in range(warm_ups + repeat):
        for name, contender in contenders.items():
            if used[name] > patience and times[name]:
                continue
            decoded = tokens if used[name] <= patience else math.ceil(tokens / 4)
            start = time.perf_counter()
            with contender.using():
                pair = (
                    prefill(contender.model, prompt, **contender.options),
                    decode(contender.model, context, decoded, **contender.options),
                )
            used[name] += time.perf_counter() - start
            if repetition >= warm_ups:  # kernels are compiled before, and prefills recorded
                times[name].append(pair)
    timings = {}
    for name, pairs in times.items():
        first, later = (statistics.median(column) for column in zip(*pairs, strict=True))
        timings[name] = Timing(first, later, len(pairs))
    return timings
