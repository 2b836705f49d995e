"""Products of encoded Q and K: integers in every view, and the scores that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neurons import Encoding
from neurons.functional import count_to_spikes, spikes_to_events
from snnllm.cache import from_payload, to_payload
from snnllm.kernels.products import integer_product
from snnllm.views import View

if TYPE_CHECKING:
    from snnllm.attention import SpikingLlamaAttention


def _train(module: SpikingLlamaAttention, key: Encoding) -> Tensor:
    """What K sends: the spikes of every step, or events in the slots of every step (binary), `[T, B, H, S, D]`."""
    encoder = module.k_encoder
    groups = encoder.channel_group.unsqueeze(1)  # [H_kv, 1, D]
    steps = torch.tensor(encoder.steps, device=groups.device)[groups.long()]
    spikes = count_to_spikes(key.count, encoder.levels, max(encoder.steps), steps)
    if module.view is View.BINARY:
        return spikes_to_events(spikes.float(), encoder.levels)
    return spikes


def step_payloads(module: SpikingLlamaAttention, key: Tensor) -> Tensor:
    """Payloads of every step of K (binary: of every slot; collapsed: K), whose centred counts sum to those of K.

    Args:
        module: The attention layer; its view decides about the steps.
        key: payloads uint8 `[B, H_kv, S, bytes]`.

    Returns:
        uint8 `[T, B, H_kv, S, bytes]`. The bias charge is taken off with the first.
    """
    if module.view is View.COLLAPSED:
        return key[None]
    layout = module.k_encoder.layout
    encoding = from_payload(key, layout)
    zero = encoding.zero_point
    payloads = []
    for step in _train(module, encoding):
        sent = encoding._replace(count=step.to(encoding.count.dtype), zero_point=zero)
        payloads.append(to_payload(sent, layout))
        zero = torch.zeros_like(zero)
    return torch.stack(payloads)


def query_key_accumulators(
    module: SpikingLlamaAttention, query: Encoding, key: Encoding
) -> list[Tensor]:
    """Centred integer products of Q and K, one per channel group of K.

        A_g[i, j] = sum_{c in g} (q_ic - z_ig) (k_jc - z_jg),   z_ig = z_i if Q has one group

    Args:
        module: The attention layer; its view decides how the sum is executed.
        query: Counts `[B, H, S_q, D]`.
        key: Counts `[B, H_kv, S_k, D]`.

    Returns:
        int32 `[B, H_kv, H/H_kv * S_q, S_k]` per group, the same integers in every view.
    """
    batch, kv_heads, _, dim = key.count.shape
    q = module.q_encoder.centre(query).reshape(batch, kv_heads, -1, dim)
    encoder = module.k_encoder
    groups = encoder.channel_group.unsqueeze(1)  # [H_kv, 1, D]
    bound_q, capacity = max(module.q_encoder.capacities), max(encoder.capacities)
    if module.view is View.COLLAPSED:
        centred = encoder.centre(key)
        return [
            integer_product(q, centred.masked_fill(groups != g, 0), bound_q, capacity)
            for g in range(len(encoder.steps))
        ]
    train = _train(module, key)
    length = len(train) // max(encoder.steps)  # slots of a step
    total = []
    for g in range(len(encoder.steps)):
        member = groups == g
        silent = member.to(torch.int16).expand(batch, kv_heads, 1, dim)
        summed = torch.stack(
            [
                integer_product(q, s.masked_fill(~member, 0), bound_q, capacity)
                for s in train[: length * encoder.steps[g]]  # later steps are silent
            ]
        ).sum(0, dtype=torch.int32)
        # sum_c (q_c - z) over the group: what the bias charge of K multiplies.
        row = integer_product(q, silent, bound_q, 1)
        total.append(summed - row * key.zero_point[..., g].unsqueeze(-2))
    return total


def spiking_scores(
    module: SpikingLlamaAttention, query: Tensor, key: Tensor, scaling: float
) -> Tensor:
    """`scaling * sum_g (A_g s_qg) s_kg`, float32 `[B, H, S_q, S_k]`, with torch operations.

    Args:
        module: The attention layer.
        query: payloads `[B, H, S_q, bytes]`.
        key: payloads `[B, H_kv, S_k, bytes]`.
        scaling: Factor of the scores.
    """
    batch, heads, tokens, _ = query.shape
    encoded_q = from_payload(query, module.q_encoder.layout)
    encoded_k = from_payload(key, module.k_encoder.layout)
    s_q = encoded_q.threshold.view(batch, key.shape[1], -1, encoded_q.threshold.shape[-1])
    scores: Tensor | None = None
    for g, product in enumerate(query_key_accumulators(module, encoded_q, encoded_k)):
        own = s_q[..., g if s_q.shape[-1] > 1 else 0, None]
        term = (product.float() * own) * encoded_k.threshold[..., g].unsqueeze(-2)
        scores = term if scores is None else scores + term
    assert scores is not None  # an encoder has at least one group
    return scores.view(batch, heads, tokens, -1) * scaling
