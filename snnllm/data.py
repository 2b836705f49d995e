"""Text for calibration and evaluation, as windows of tokens.

A text comes from a file or from a named dataset (``load_text`` of ``snnllm.texts``), is tokenised once as
a whole (``tokenize``), and is cut into windows: one after the other for perplexity
(``token_windows``) or at random offsets for calibration (``random_windows``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snnllm.texts import DATA_VARIABLE, load_text, local_tasks

__all__ = [
    "DATA_VARIABLE",
    "load_text",
    "local_tasks",
    "random_windows",
    "token_windows",
    "tokenize",
]


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Tokenise the whole text once, with the special tokens the tokenizer adds by default.

    Args:
        text: The text.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        Token ids, int64 ``[N]``.

    Raises:
        ValueError: The text gave no token.
    """
    # verbose=False: the text is longer than the model's context on purpose, windows are cut next.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() == 0:
        raise ValueError("The text gave no tokens; give a text that is not empty.")
    return ids


def token_windows(ids: Tensor, window: int, limit: int | None = None) -> Tensor:
    """Cut the tokens into windows that follow each other and do not overlap.

    With N' = floor(N / window) windows available and a limit n < N', window number
    ``floor(i N' / n)`` is taken for i = 0 .. n-1, so that a few windows sample the whole text.
    Tokens after the last whole window are dropped, as in the GPTQ protocol.

    Args:
        ids: Token ids, ``[N]``.
        window: Tokens per window.
        limit: Largest number of windows; None takes all.

    Returns:
        ``[min(N', limit), window]``.

    Raises:
        ValueError: The text is shorter than one window, or an argument is out of range.
    """
    _check_window(ids, window)
    windows = ids[: ids.numel() // window * window].view(-1, window)
    if limit is None or limit >= len(windows):
        return windows
    if limit < 1:
        raise ValueError(f"The limit must be at least 1 window, got {limit}.")
    return windows[torch.arange(limit, device=ids.device) * len(windows) // limit]


def random_windows(ids: Tensor, window: int, count: int, seed: int) -> Tensor:
    """Cut windows at random offsets, uniform and with replacement.

    Args:
        ids: Token ids, ``[N]``.
        window: Tokens per window.
        count: Number of windows.
        seed: Seed of the offsets; the same seed gives the same windows on every machine.

    Returns:
        ``[count, window]``.

    Raises:
        ValueError: The text is shorter than one window, or an argument is out of range.
    """
    _check_window(ids, window)
    if count < 1:
        raise ValueError(f"The number of windows must be at least 1, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(ids.numel() - window + 1, (count,), generator=generator)
    return ids.unfold(0, window, 1)[offsets.to(ids.device)]


def _check_window(ids: Tensor, window: int) -> None:
    if ids.dim() != 1:
        raise ValueError(f"Token ids must have one axis [N], got shape {list(ids.shape)}.")
    if window < 2:
        raise ValueError(
            f"A window needs at least 2 tokens (one to see, one to predict), got {window}."
        )
    if ids.numel() < window:
        raise ValueError(
            f"The text has {ids.numel()} tokens, fewer than one window of {window}; give a longer "
            f"text or a window of at most {ids.numel()} tokens."
        )
