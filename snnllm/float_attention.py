"""Attention in float: scores with a mask, and what calibration looks into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

CALIBRATION_ATTENTION = "spiking_calibration"


def masked(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Scores with a mask: a float one is added, a bool one (True: may be seen) fills.

    transformers passes a 4-D mask of the caller on as it is, so both kinds arrive here.
    """
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        # As transformers' eager mask: finite, so that a row without any key has no NaN.
        return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores + attention_mask


def calibration_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Float attention that shows Q, K, V and P to the block's `attention_observer`."""
    groups = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, repeat_kv(key, groups).mT) * scaling
    probability = nn.functional.softmax(masked(scores, attention_mask).float(), dim=-1)
    observer = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(query, key, value, probability)
    out = torch.matmul(probability.to(query.dtype), repeat_kv(value, groups))
    return out.transpose(1, 2).contiguous(), probability
