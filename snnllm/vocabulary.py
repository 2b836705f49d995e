"""Token embedding and output head in 8 bits: int8 codes, and one scale for each token.

    scale_v = max_c |w_vc| / 127,   code_vc = round(w_vc / scale_v),   w_hat_vc = scale_v code_vc

The embedding looks rows `w_hat_v` up; the head gives the logits `(sum_c x_c code_vc) scale_v`, summed in float32 and
rounded once, to the dtype of x. Triton (on a GPU), C (few rows on a CPU) and torch (the rest, and whatever has a
gradient) each sum in an order of their own: their logits agree up to the order of float32 sums. All views of a model
call the same one: equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neurons.backends.spec import DTYPES
from snnllm import shared_input
from snnllm.config import FLOAT_BITS, SpikeConfig
from snnllm.kernels.cpu.head import head_rows, multiplies
from snnllm.precision import keeping_float32

_LARGEST = 127
_FLOATS = 1 << 20
"""Elements of a table that exist in floating point at a time."""


class QuantizedTable(NamedTuple):
    """A table of tokens; the real one is `scale[:, None] * codes`.

    Attributes:
        codes: int8 `[V, H]`, in -127..127.
        scale: float32 `[V]`, positive.
    """

    codes: Tensor
    scale: Tensor


def quantize_table(table: Tensor) -> QuantizedTable:
    """Symmetric 8-bit codes of each row, rounded half to even; no float32 copy of the table is made.

    Args:
        table: float `[V, H]`, one row for each token.

    Raises:
        ValueError: The table holds NaN or infinity.
    """
    codes = torch.empty(table.shape, dtype=torch.int8, device=table.device)
    scale = torch.empty(len(table), dtype=torch.float32, device=table.device)
    for rows, code, own in zip(
        *(part.split(_rows_at_once(table)) for part in (table.detach(), codes, scale)), strict=True
    ):
        weight = rows.float()
        own.copy_(weight.abs().amax(dim=1) / _LARGEST)
        own.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        code.copy_((weight / own[:, None]).round_().clamp_(-_LARGEST, _LARGEST))
    if not torch.isfinite(scale).all():
        raise ValueError(
            "The table holds NaN or infinite values, which have no codes; the source is broken."
        )
    return QuantizedTable(codes, scale)


def stored_table(name: str, table: Tensor, spike: SpikeConfig) -> dict[str, Tensor]:
    """The tensors of an embedding or a head as a checkpoint of this configuration holds them.

    Args:
        name: Of the module, such as `lm_head`.
        table: float `[V, H]`.
        spike: Says how many bits a table has.
    """
    if spike.embedding_bits == FLOAT_BITS:
        return {f"{name}.weight": table}
    codes, scale = quantize_table(table)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def _rows_at_once(table: Tensor) -> int:
    return max(1, _FLOATS // max(1, table.shape[1]))


class _Table(nn.Module):
    """Codes and scales of V tokens in H channels; zeros until they are set or loaded.

    Codes are not trained: `requires_grad_(True)` of the whole model fails in torch, which wants floats for that.

    Args:
        tokens: `V`.
        channels: `H`.
    """

    weight: nn.Parameter
    weight_scale: Tensor

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        codes = torch.zeros(tokens, channels, dtype=torch.int8)
        # A parameter: one that two modules share stays so when the model moves.
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(tokens, dtype=torch.float32))

    def set_table(self, table: QuantizedTable) -> None:
        """Store codes and scales."""
        self.weight.copy_(table.codes)
        self.weight_scale.copy_(table.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with keeping_float32(self):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"tokens={self.weight.shape[0]}, channels={self.weight.shape[1]}, bits=8"


class QuantizedEmbedding(_Table):
    """`nn.Embedding` with a table in 8 bits: token ids `[...]` -> `[..., H]` in the dtype that the model has."""

    row_dtype: Tensor

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__(tokens, channels)
        # Nothing, in the dtype of the rows: it is cast with the model.
        self.register_buffer("row_dtype", torch.empty(0), persistent=False)

    @property
    def num_embeddings(self) -> int:
        """`V`."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """`H`."""
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up; on a GPU those of ids that are no token are NaN."""
        dtype = self.row_dtype.dtype
        kernels = shared_input.kernels_run_on(ids.device.type)
        if kernels and dtype in DTYPES and ids.numel() > 0:
            from snnllm.kernels.triton.vocabulary import embed  # needs Triton

            rows: Tensor = embed(ids.contiguous(), self.weight, self.weight_scale, dtype)
            return rows
        codes = nn.functional.embedding(ids, self.weight)
        return (codes * self.weight_scale[ids].unsqueeze(-1)).to(dtype)


class QuantizedHead(_Table):
    """An output head with weights in 8 bits: hidden states `[..., H]` -> logits `[..., V]` in the same dtype.

    Args:
        tokens: `V`.
        channels: `H`.
        tied: The embedding whose table this is; None for one of its own.
    """

    def __init__(self, tokens: int, channels: int, tied: QuantizedEmbedding | None = None) -> None:
        super().__init__(tokens, channels)
        self._tied = None if tied is None else (tied,)  # no submodule
        if tied is not None:  # transformers ties parameters only
            self.weight = tied.weight
            del self.weight_scale

    @property
    def scale(self) -> Tensor:
        """float32 `[V]`, that of the embedding if they are tied."""
        return self.weight_scale if self._tied is None else self._tied[0].weight_scale

    @property
    def in_features(self) -> int:
        """`H`."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """`V`."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the head."""
        rows = x.reshape(-1, self.in_features)
        with_gradient = _has_gradient(x)
        if (
            shared_input.kernels_run_on(x.device.type)
            and x.dtype in DTYPES
            and x.numel() > 0
            and not with_gradient
        ):
            from snnllm.kernels.triton.vocabulary import head_logits  # needs Triton

            logits: Tensor = head_logits(rows.contiguous(), self.weight, self.scale)
        elif not with_gradient and multiplies(rows):
            logits = head_rows(rows, self.weight, self.scale).to(x.dtype)
        else:
            logits = reference_logits(rows, self.weight, self.scale)
        return logits.view(*x.shape[:-1], self.out_features)


def reference_logits(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The logits `(x codes^T) scale` in torch; a part of the table is float at a time, unless there is a gradient.

    Args:
        x: float `[M, H]`.
        codes: int8 `[V, H]`.
        scale: float32 `[V]`.

    Returns:
        `[M, V]` in the dtype of x; float64 is summed in float64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    at_once = _rows_at_once(codes)
    with torch.autocast(x.device.type, enabled=False):
        if _has_gradient(x):  # which needs every part again
            parts = zip(codes.split(at_once), scale.split(at_once), strict=True)
            products = [nn.functional.linear(wide, c.to(wide.dtype)) * s for c, s in parts]
            return torch.cat(products, 1).to(x.dtype)
        logits = x.new_empty(len(x), len(codes))
        buffer = wide.new_empty(min(at_once, len(codes)), x.shape[1])
        for first in range(0, len(codes), at_once):
            part = slice(first, first + at_once)
            weight = buffer[: len(codes[part])].copy_(codes[part])
            logits[:, part] = nn.functional.linear(wide, weight) * scale[part]
    return logits


def _has_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def quantize_vocabulary(model: Any) -> None:
    """Give a LLaMA an embedding and a head in 8 bits, both empty; tied ones share codes and scales.

    Args:
        model: A `LlamaForCausalLM`.
    """
    sizes = (model.config.vocab_size, model.config.hidden_size)
    embedding = QuantizedEmbedding(*sizes)
    tied = embedding if model.config.tie_word_embeddings else None
    model.model.embed_tokens, model.lm_head = embedding, QuantizedHead(*sizes, tied)
