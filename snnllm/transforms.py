"""Function-preserving transforms of a LLaMA: gains, saliency-first permutations, rotations.

A basis change of the residual stream, `x' = x R` with orthogonal `R`, leaves RMSNorm without gain
unchanged up to the same `R`, so it folds into every weight that reads or writes the stream. With
`R = permutation x blockdiag(R_ordinary, R_salient)` the outlier channels stay in a group of their own
(more steps, own threshold) and everything else becomes Gaussian: *rotation inside the saliency
groups*. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), ResQ (arXiv 2412.14363) for
the subspace split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from snnllm.sources import Source


def power_of_two_factor(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def salient_count(channels: int, ratio: float) -> int:
    """Size of the salient group for rotation: the power of two nearest to `ratio * channels`.

    Powers of two have Hadamard matrices, and leave the rest a multiple of a large power of two
    (576 = 512 + 64, 1536 = 1408 + 128). 0 when the ratio is 0.
    """
    if ratio <= 0.0:
        return 0
    exponent = round(float(np.log2(max(1.0, ratio * channels))))
    return min(1 << max(0, exponent), channels)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random rotation that spreads every channel over all others.

        R = (Q_m kron H_p / sqrt(p)) diag(signs),   size = m p, p the largest power of two in it

    with a Hadamard matrix H (scipy) and a random orthogonal Q (QR of a Gaussian matrix).

    Args:
        size: Number of channels, >= 1.
        generator: Source of the signs and of Q.

    Returns:
        float64 `[size, size]`, rows are the old channels: `x' = x R`.
    """
    if size == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    p = power_of_two_factor(size)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    left = random_orthogonal(size // p, generator)
    right = torch.from_numpy(hadamard(p).astype(np.float64)) / p**0.5
    rotation: Tensor = signs.unsqueeze(1) * torch.kron(left, right)
    return rotation


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 `[size, size]`."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    haar: Tensor = (q * torch.sign(r.diagonal())).contiguous()
    return haar


def group_rotation(group: Tensor, generator: torch.Generator | None) -> Tensor:
    """Permute channels so that their groups are contiguous, and rotate inside each group.

    Args:
        group: Group of each channel, integers `[C]`.
        generator: Source of the rotations; None permutes only.

    Returns:
        Orthogonal float64 `[C, C]`, `x' = x R`; the new channels are sorted by group.
    """
    order = torch.argsort(group.long(), stable=True)
    sizes = torch.bincount(group.long()).tolist()
    if generator is None:
        blocks = torch.eye(len(order), dtype=torch.float64)
    else:
        blocks = torch.block_diag(*[orthogonal(n, generator) for n in sizes if n > 0])
    rotation = torch.zeros_like(blocks)
    rotation[order] = blocks
    return rotation


def sorted_groups(group: Tensor) -> Tensor:
    """Groups of the channels `[..., C]` in the order of `group_rotation`, uint8."""
    return group.sort().values.to(torch.uint8)


class SignedOrder(NamedTuple):
    """An order of the inner channels of an MLP, and a sign for each: folded into its weights.

    `silu(gate) * up` is linear in up, so that a sign of its rows is one of the product.

    Attributes:
        order: original channel of every new position, int64 `[K]`.
        signs: +-1 of every new position, float64 `[K]`.
    """

    order: Tensor
    signs: Tensor

    @classmethod
    def of_groups(cls, group: Tensor, generator: torch.Generator | None) -> Self:
        """Bring the channels of a group together, with random signs; None: without.

        Args:
            group: Group of each channel, integers `[K]`.
            generator: Source of the signs.
        """
        order = torch.argsort(group.long(), stable=True)
        if generator is None:
            return cls(order, torch.ones(len(order), dtype=torch.float64))
        signs = torch.randint(0, 2, (len(order),), generator=generator).double() * 2 - 1
        return cls(order, signs)


def pair_signs(heads: int, channels: int, generator: torch.Generator | None) -> Tensor:
    """A random sign for each pair of channels that RoPE turns, which therefore goes past RoPE.

    Folded into q_proj and k_proj, it is all that a Hadamard matrix behind RoPE needs in front of it;
    `Q K^T` does not change by a bit.

    Args:
        heads: KV heads.
        channels: D, even; RoPE pairs channel j with channel j + D / 2.
        generator: Source of the signs; None: all are 1.

    Returns:
        +-1, float64 `[heads, D]`.
    """
    if generator is None:
        return torch.ones(heads, channels, dtype=torch.float64)
    half = torch.randint(0, 2, (heads, channels // 2), generator=generator).double() * 2 - 1
    return torch.cat((half, half), dim=1)


class RotatedSource(Source):
    """A dense LLaMA in another residual basis; the same function, tensor by tensor on demand.

    RMSNorm gains are absorbed into the weights behind them, the residual stream is multiplied by
    `residual`, and the values of each KV head by `values[layer][head]`; the inner channels of each
    MLP get another order and signs, queries and keys other signs. The head becomes untied.

    Args:
        source: The original model.
        residual: Orthogonal `[hidden, hidden]`.
        values: One orthogonal `[H_kv, D, D]` per layer, or None to leave the values alone.
        inner: Order and signs of the inner channels of the MLP of every layer, or None.
        heads: Signs of the channels of Q and K (`pair_signs`), one `[H_kv, D]` per layer, or None.
    """

    def __init__(
        self,
        source: Source,
        residual: Tensor,
        values: Sequence[Tensor] | None = None,
        inner: Sequence[SignedOrder] | None = None,
        heads: Sequence[Tensor] | None = None,
    ) -> None:
        self.name = source.name
        self._source, self._residual, self._values = source, residual.double(), values
        self._inner, self._heads = inner, heads
        self._dtype = source.tensor("model.norm.weight").dtype
        self._tied = bool(source.config.tie_word_embeddings)
        settings = source.config.to_dict()
        settings["tie_word_embeddings"] = False
        self.config = LlamaConfig(**settings)

    def names(self) -> frozenset[str]:
        """Names of the tensors, an untied head included."""
        return self._source.names() | {"lm_head.weight"}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the original."""
        return self._source.tokenizer()

    def carry_files(self, output: Path) -> None:
        """Put the original's tokenizer and generation config beside the weights."""
        self._source.carry_files(output)

    def tensor(self, name: str) -> Tensor:
        """One transformed tensor, computed in float64 and stored in the dtype of the original."""
        if name.endswith(("layernorm.weight", "norm.weight")):
            return torch.ones_like(self._source.tensor(name))
        return self._transformed(name).to(self._dtype)

    def _transformed(self, name: str) -> Tensor:
        r = self._residual
        if name == "model.embed_tokens.weight":
            return self._original(name) @ r
        if name == "lm_head.weight":
            stored = "model.embed_tokens.weight" if self._tied else name
            return (self._original(stored) * self._original("model.norm.weight")) @ r
        prefix, _, path = name.partition(".self_attn.")
        if not path:
            prefix, _, path = name.partition(".mlp.")
        linear, _, kind = path.partition(".")
        if kind == "bias":
            bias = self._original(name)
            if linear in ("o_proj", "down_proj"):
                return bias @ r
            if linear in ("gate_proj", "up_proj"):
                return self._reorder_rows(prefix, linear, bias)
            return self._turn_heads(prefix, linear, bias.unsqueeze(1)).squeeze(1)
        weight = self._original(name)
        if linear in ("q_proj", "k_proj", "v_proj"):
            weight = (weight * self._original(f"{prefix}.input_layernorm.weight")) @ r
            return self._turn_heads(prefix, linear, weight)
        if linear in ("gate_proj", "up_proj"):
            gain = self._original(f"{prefix}.post_attention_layernorm.weight")
            return self._reorder_rows(prefix, linear, weight * gain) @ r
        if linear == "o_proj":
            weight = self._rotate_heads(prefix, weight)
        if linear == "down_proj" and self._inner is not None:
            order, signs = self._inner[_layer_of(prefix)]
            weight = weight[:, order] * signs
        return r.T @ weight

    def _original(self, name: str) -> Tensor:
        return self._source.tensor(name).double()

    def _value_rotation(self, prefix: str) -> Tensor | None:
        if self._values is None:
            return None
        return self._values[_layer_of(prefix)].double()

    def _reorder_rows(self, prefix: str, linear: str, rows: Tensor) -> Tensor:
        """Order the outputs of gate_proj and up_proj, weight or bias; the signs are those of up."""
        if self._inner is None:
            return rows
        order, signs = self._inner[_layer_of(prefix)]
        if linear == "gate_proj":
            return rows[order]
        return rows[order] * signs.view(-1, *[1] * (rows.dim() - 1))

    def _turn_heads(self, prefix: str, linear: str, rows: Tensor) -> Tensor:
        """Rotate the outputs of v_proj, give those of q_proj and k_proj their signs."""
        if linear == "v_proj":
            return self._rotate_values(prefix, rows)
        if self._heads is None:
            return rows
        signs = self._heads[_layer_of(prefix)].double()
        repeated = signs.repeat_interleave(len(rows) // signs.numel(), dim=0)
        return rows * repeated.flatten().unsqueeze(1)

    def _rotate_values(self, prefix: str, rows: Tensor) -> Tensor:
        """Rotate the outputs of v_proj: `v' = v R_h` per KV head."""
        rotation = self._value_rotation(prefix)
        if rotation is None:
            return rows
        heads, dim, _ = rotation.shape
        return (rotation.mT @ rows.view(heads, dim, -1)).reshape(rows.shape)

    def _rotate_heads(self, prefix: str, weight: Tensor) -> Tensor:
        """Undo the value rotation in front of o_proj, for the query heads of each KV head."""
        rotation = self._value_rotation(prefix)
        if rotation is None:
            return weight
        heads, dim, _ = rotation.shape
        repeated = rotation.repeat_interleave(weight.shape[1] // (heads * dim), dim=0)
        blocks = weight.view(weight.shape[0], -1, dim).transpose(0, 1)
        return (blocks @ repeated).transpose(0, 1).reshape(weight.shape)


def _layer_of(prefix: str) -> int:
    return int(prefix.rsplit(".", 1)[1])
