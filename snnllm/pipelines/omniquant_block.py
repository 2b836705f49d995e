"""A decoder block that is trained around its spikes: equivalent transformation, clipping, rounding.

The equivalent transformation (LET) leaves the float block unchanged whatever its values are:

    q/k/v, gate/up   norm gain / s,              input columns * s
    v - o            v rows / s_h,               o columns * s_h      one s per KV head and channel,
                                                                      repeated over its query heads
    q - k            q rows / s, k rows * s      one s per KV head and rotary pair: a scaling of both
                                                 halves of a pair alike commutes with RoPE
    up - down        up rows / s,                down columns * s     behind the product with the gate

Source: OmniQuant (arXiv 2308.13137), here in forms that are exact with RoPE and grouped queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from snnllm.attention import SpikingLlamaAttention
from snnllm.head_rotation import HeadRotation
from snnllm.linear import SpikingLinear
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.omniquant_units import Operand, Unit
from snnllm.pipelines.streaming import INPUT_GROUPS, linear_of

SCALE_FLOOR = 1e-2
"""Least scale of the equivalent transformation (method.md section 5)."""


class TrainableBlock(nn.Module):
    """The float model of one spiking decoder block, differentiable in everything that is learned.

    Args:
        dense: The float block; its norms and linears are used.
        spiking: The attention that will be spiking (its encoders and rotation), or None.
        modules: Empty spiking linears by path, encoders filled; a path that is missing stays dense.
        config: The LLaMA configuration.
        max_abs: Largest magnitude of each input channel, per entry of `INPUT_GROUPS`.
        moments: Mean square of each input channel, likewise; None starts clipping from a constant.
        means: Offsets of the inputs, likewise; None for no offsets.
        options: What is learned.
    """

    key_offset: Tensor | None

    def __init__(
        self,
        dense: Any,
        spiking: SpikingLlamaAttention | None,
        modules: Mapping[str, SpikingLinear],
        config: LlamaConfig,
        max_abs: Sequence[Tensor],
        moments: Sequence[Tensor] | None,
        means: Sequence[Tensor] | None,
        options: OmniQuantOptions,
    ) -> None:
        super().__init__()
        self.options = options
        attention = dense.self_attn
        self.head_dim, self.scaling = int(attention.head_dim), float(attention.scaling)
        self.kv_heads = int(config.num_key_value_heads)
        self.repeats = int(config.num_attention_heads) // self.kv_heads
        self.eps, self.activation = float(config.rms_norm_eps), dense.mlp.act_fn
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.register_buffer(name, getattr(dense, name).weight.detach().clone())
        self.scales = nn.ParameterDict(self._initial_scales(dense, max_abs))
        units = [
            self._units(dense, number, modules, moments, means)
            for number in range(len(INPUT_GROUPS))
        ]
        self.units = nn.ModuleList(unit for group in units for unit in group)
        self._counts = [len(group) for group in units]
        self.query = self.key = self.value = None
        self.rotation: HeadRotation | None = None
        self.register_buffer("key_offset", None)
        if spiking is not None:
            learn = options.clip_activations
            self.query = Operand(spiking.q_encoder, learn)
            self.key = Operand(spiking.k_encoder, learn)
            self.value = Operand(spiking.v_encoder, learn)
            self.rotation = deepcopy(spiking.qk_rotation)
            self.key_offset = spiking._buffers.get("offset_key")

    # -- construction ------------------------------------------------------------------------------

    def _initial_scales(self, dense: Any, max_abs: Sequence[Tensor]) -> dict[str, nn.Parameter]:
        """`s = max|x|^a / max|w|^(1-a)`, at least `SCALE_FLOOR`; 1 for q - k."""

        def start(x: Tensor, paths: Sequence[str], heads: bool = False) -> nn.Parameter:
            w = torch.stack([linear_of(dense, p).weight.detach().abs().amax(0) for p in paths])
            largest, power = w.amax(0), self.options.scale_power
            if heads:  # query heads of one KV head share its values
                x, largest = (
                    t.view(self.kv_heads, self.repeats, -1).amax(1).flatten() for t in (x, largest)
                )
            if power is None:
                return nn.Parameter(torch.ones_like(x))
            s = x.clamp(min=1e-5).pow(power) / largest.clamp(min=1e-5).pow(1.0 - power)
            return nn.Parameter(s.clamp(min=SCALE_FLOOR))

        pairs = max_abs[0].new_ones(self.kv_heads, self.head_dim // 2)
        scales = {
            "input": start(max_abs[0], INPUT_GROUPS[0]),
            "heads": start(max_abs[1], INPUT_GROUPS[1], heads=True),
            "pairs": nn.Parameter(pairs),
            "post": start(max_abs[2], INPUT_GROUPS[2]),
        }
        if self.options.scale_down:
            scales["down"] = start(max_abs[3], INPUT_GROUPS[3])
        return scales

    def _units(
        self,
        dense: Any,
        number: int,
        modules: Mapping[str, SpikingLinear],
        moments: Sequence[Tensor] | None,
        means: Sequence[Tensor] | None,
    ) -> list[Unit]:
        """Linears of one input, together where their encoders are the same."""
        column = self.columns()[number]
        column = column.detach() if column is not None else None
        runs: list[list[str]] = []
        for path in INPUT_GROUPS[number]:
            last = modules.get(runs[-1][0]) if runs else None
            if runs and _same(last, modules.get(path)):
                runs[-1].append(path)
            else:
                runs.append([path])
        units = []
        for paths in runs:
            linears = [linear_of(dense, p) for p in paths]
            module = modules.get(paths[0])
            moment = None if moments is None else moments[number]
            mean = None if means is None or module is None else means[number]
            if column is not None:
                moment = None if moment is None else moment / column.square()
                mean = None if mean is None else mean / column
            if module is not None and module.rotation is not None:
                mean = None if mean is None else module.rotation(mean)
                moment = None if moment is None else torch.full_like(moment, float(moment.mean()))
            biases = [linear.bias for linear in linears if linear.bias is not None]
            units.append(
                Unit(
                    paths,
                    torch.cat([linear.weight.detach().float() for linear in linears]),
                    torch.cat([b.detach().float() for b in biases]) if biases else None,
                    module,
                    moment,
                    self.options.weight_rate > 0,
                    self.options.clip_activations,
                    mean,
                )
            )
        return units

    @property
    def groups(self) -> list[list[Unit]]:
        """The units per entry of `INPUT_GROUPS`."""
        units = cast(list[Unit], list(self.units))
        starts = [sum(self._counts[:g]) for g in range(len(self._counts))]
        return [units[a : a + n] for a, n in zip(starts, self._counts, strict=True)]

    # -- the equivalent transformation -------------------------------------------------------------

    def columns(self) -> list[Tensor | None]:
        """Factors of the input channels, per entry of `INPUT_GROUPS`."""
        heads = self.scales["heads"].view(self.kv_heads, 1, -1).expand(-1, self.repeats, -1)
        down = self.scales.get("down", None)
        return [self.scales["input"], heads.reshape(-1), self.scales["post"], down]

    def rows(self) -> dict[str, Tensor]:
        """Factors of the output channels by path; a path that is missing has none."""
        pairs = self.scales["pairs"]
        pair = torch.cat([pairs, pairs], dim=1)
        rows = {
            # Expanded, not gathered: the gradient is a sum in a fixed order.
            "self_attn.q_proj": 1.0 / pair.unsqueeze(1).expand(-1, self.repeats, -1).flatten(),
            "self_attn.k_proj": pair.flatten(),
            "self_attn.v_proj": 1.0 / self.scales["heads"],
        }
        if "down" in self.scales:
            rows["mlp.up_proj"] = 1.0 / self.scales["down"]
        return rows

    def row(
        self, unit: Unit, rows: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> Tensor | None:
        """Factors of the output channels of a unit `[N]`, or None if all are 1."""
        if not any(path in rows for path in unit.paths):
            return None
        ones = self.scales["input"].new_ones
        return torch.cat([rows[p] if p in rows else ones(sizes[p]) for p in unit.paths])

    def gains(self) -> tuple[Tensor, Tensor]:
        """Norm gains after the equivalent transformation."""
        return (
            self.get_buffer("input_layernorm") / self.scales["input"],
            self.get_buffer("post_attention_layernorm") / self.scales["post"],
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Output channels of the linears by path."""
        heads, dim = self.kv_heads, self.head_dim
        inner, hidden = self.groups[3][0].weight.shape[1], len(self.get_buffer("input_layernorm"))
        return {
            "self_attn.q_proj": heads * self.repeats * dim,
            "self_attn.k_proj": heads * dim,
            "self_attn.v_proj": heads * dim,
            "self_attn.o_proj": hidden,
            "mlp.gate_proj": inner,
            "mlp.up_proj": inner,
            "mlp.down_proj": hidden,
        }

    @torch.no_grad()
    def floor_scales(self) -> None:
        """Keep the scales at least `SCALE_FLOOR`, without waiting for the device."""
        for scale in self.scales.values():
            scale.clamp_(min=SCALE_FLOOR)

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Output of the block for hidden states `[B, S, hidden]`, float32.

        Args:
            x: Hidden states in front of the block.
            cos: Rotary cosines `[1, S, D]`.
            sin: Rotary sines `[1, S, D]`.
            mask: Causal mask, added to the scores, `[1, 1, S, S]`.
        """
        first, second = self.gains()
        groups = self.groups
        columns, rows = self.columns(), self.rows()

        def linears(number: int, inputs: Tensor) -> Tensor:
            units = [
                unit(inputs, columns[number], self.row(unit, rows, self.sizes))
                for unit in groups[number]
            ]
            out: Tensor = units[0] if len(units) == 1 else torch.cat(units, dim=-1)
            return out

        qkv = linears(0, _norm(x, first, self.eps))
        x = x + linears(1, self._attention(qkv, cos, sin, mask))
        gate, up = linears(2, _norm(x, second, self.eps)).chunk(2, dim=-1)
        out: Tensor = x + linears(3, self.activation(gate) * up)
        return out

    def _attention(self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Input of o_proj from the outputs of q, k and v, `[B, S, H D]`."""
        batch, tokens, _ = qkv.shape
        heads = qkv.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.kv_heads * self.repeats, self.kv_heads, self.kv_heads], dim=1)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if self.rotation is not None:
            q, k = self.rotation(q), self.rotation(k)
        if self.key_offset is not None:
            k = k - self.key_offset.unsqueeze(1)
        if self.query is not None and self.key is not None and self.value is not None:
            q, k, v = self.query(q), self.key(k), self.value(v)
        q = q.reshape(batch, self.kv_heads, self.repeats * tokens, self.head_dim) * self.scaling
        scores = (q @ k.mT).view(batch, -1, tokens, tokens) + mask
        probability = torch.softmax(scores, dim=-1).view(batch, self.kv_heads, -1, tokens)
        out: Tensor = (probability @ v).view(batch, -1, tokens, self.head_dim)
        return out.transpose(1, 2).reshape(batch, tokens, -1)


def _same(first: SpikingLinear | None, second: SpikingLinear | None) -> bool:
    """Whether two linears encode their input alike."""
    if first is None or second is None:
        return first is second
    same = torch.equal(first.encoder.channel_group, second.encoder.channel_group)
    return same and first.layout == second.layout


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
