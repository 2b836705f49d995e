"""Token perplexity in the convention of the quantisation papers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PerplexityResult", "Progress", "token_perplexity"]

Progress = Callable[[Sequence[Tensor]], Iterable[Tensor]]
"""A wrapper that shows progress while its argument is iterated over, such as `tqdm.tqdm`."""

_TOKENS_PER_CHUNK = 256
"""Rows of logits made into losses at once: the float32 copy takes 50 MB for 49,152 words."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log-likelihood of a predicted token, in nats.
        tokens: Number of predicted tokens, ``windows * (window_length - 1)``.
        windows: Number of windows.
        window_length: Tokens per window; the convention is called ``token_ppl@window_length``.
        seconds: Wall-clock time.
        window_nll: The nll of each window, for paired comparisons of two models.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window_length: int
    seconds: float
    window_nll: tuple[float, ...] = dataclasses.field(repr=False)

    @property
    def metric(self) -> str:
        """The name under which the number may be compared: ``token_ppl@2048`` and the like."""
        return f"token_ppl@{self.window_length}"

    def to_dict(self) -> dict[str, Any]:
        """Give the fields and the metric name as JSON types."""
        return {
            "metric": self.metric,
            **dataclasses.asdict(self),
            "window_nll": list(self.window_nll),
        }


def token_perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    r"""Measure token perplexity on windows that do not see each other.

    In window w with W tokens, tokens 2 .. W are predicted from those before them in the window:

        nll_w = -1/(W-1) sum_{i=2..W} log p(t_i | t_1 .. t_{i-1}),     ppl = exp(mean_w nll_w)

    which is the figure of GPTQ, OmniQuant and SpikeLLM for W = 2048 on non-overlapping windows of
    the whole text. Log-probabilities are computed in float32 whatever the dtype of the model, sums
    in float64.

    Args:
        model: A causal language model of transformers, on any device; put into evaluation mode for
            the call.
        windows: Token ids, int64 ``[n, W]``, from ``snnllm.data.token_windows``.
        batch_size: Windows per forward pass.
        progress: Wraps the list of batches, each ``[<= batch_size, W]``.

    Returns:
        The perplexity with its provenance.

    Raises:
        ValueError: The windows have the wrong shape, are longer than the context of the model, or
            hold ids outside the vocabulary, or the batch size is below 1.
        FloatingPointError: A loss is NaN or infinite; the message names the window.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), evaluation protocol.
    """
    _check_windows(model, windows, batch_size)
    batches = windows.split(batch_size)
    device = next(model.parameters()).device
    losses: list[float] = []
    start = time.perf_counter()
    with _evaluation_mode(model), torch.no_grad():
        for batch in progress(batches) if progress is not None else batches:
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row_logits, row_ids in zip(logits, ids, strict=True):
                losses.append(_mean_nll(row_logits[:-1], row_ids[1:]))
                _check_loss(losses, len(windows))
    nll = math.fsum(losses) / len(losses)
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        windows=windows.shape[0],
        window_length=windows.shape[1],
        seconds=time.perf_counter() - start,
        window_nll=tuple(losses),
    )


def _mean_nll(logits: Tensor, targets: Tensor) -> float:
    """Mean of -log softmax(logits)[target] over ``logits: [N, V]``, a chunk of rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    chunks = zip(logits.split(_TOKENS_PER_CHUNK), targets.split(_TOKENS_PER_CHUNK), strict=True)
    for chunk, target in chunks:
        loss = nn.functional.cross_entropy(chunk.float(), target, reduction="none")
        total += loss.double().sum()
    return total.item() / len(targets)


def _check_windows(model: nn.Module, windows: Tensor, batch_size: int) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"Expected windows of token ids [n >= 1, W >= 2], got shape {list(windows.shape)}."
        )
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, got {batch_size}.")
    config = getattr(model, "config", None)
    context = trained_context(config)
    if context is not None and windows.shape[1] > context:
        raise ValueError(
            f"Windows of {windows.shape[1]} tokens are longer than the context of the model "
            f"({context}, max_position_embeddings), so the perplexity would measure positions that "
            f"it was never trained on; use a smaller --window, at most {context}."
        )
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"Token ids {low}..{high} do not fit the model's vocabulary of {vocabulary}; use the "
            "tokenizer that belongs to the model."
        )


def trained_context(config: Any) -> int | None:
    """Tokens up to which the positions of a model were trained.

    Args:
        config: Of a LLaMA, or None.

    Returns:
        `max_position_embeddings`; None where it is not known or RoPE scaling reaches beyond it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return None
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def _check_loss(losses: Sequence[float], count: int) -> None:
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(
            f"The loss of window {len(losses) - 1} (of {count}, counted from 0) is {losses[-1]}: "
            "the model's logits are not finite. Check its weights for NaN, or load it in float32."
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
