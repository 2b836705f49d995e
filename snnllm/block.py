"""The decoder block of a spiking LLaMA: transformers' own, with the work between the linears fused.

On a GPU with Triton the norms, the gate and the rotary embedding of every view run in kernels with a
defined order of operations. In the collapsed view, norm and gate encode for the linears behind them
in the same kernel, and linears that share an encoding (`snnllm.shared_input`) run as one. The outputs
are the same bit for bit. Everywhere else transformers' own forward functions run.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)

from neurons.backends.spec import DTYPES
from snnllm import shared_input
from snnllm.linear import SpikingLinear
from snnllm.shared_input import Projected, SharedInput, hooked, share_input, stamp_of

# transformers 5.20 renamed the argument; both spellings are supported.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(LlamaAttention.forward).parameters
    else "past_key_values"
)
_CONSTANT_FREQUENCIES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings that do not look at the positions for their frequencies."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PACKED = ("_prepared", "_packed_weight", "_projections", "_gates", "_down")
"""Attributes that hold packed weights."""


class SpikingRMSNorm(LlamaRMSNorm):
    """RMSNorm whose sum has a defined order where kernels run (`snnllm.norm`), the same in every view."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., K]`."""
        if not _in_kernels(self, hidden_states) or self.weight.dtype != hidden_states.dtype:
            return cast(Tensor, super().forward(hidden_states))
        from snnllm.kernels.triton.norm import rms_norm  # needs Triton

        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(rows, self.weight, self.variance_epsilon)[0].view(hidden_states.shape)


class SpikingRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary tables of frequencies that never change, in one kernel where kernels run."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Make cos and sin `[B, S, D]` of positions `[B, S]` in the dtype of x."""
        if (
            not _in_kernels(self, x)
            or self.rope_type not in _CONSTANT_FREQUENCIES
            or not x.device == position_ids.device == self.inv_freq.device
        ):
            return cast("tuple[Tensor, Tensor]", super().forward(x, position_ids))
        from snnllm.kernels.triton.rotary import rotary_tables  # needs Triton

        tables: tuple[Tensor, Tensor] = rotary_tables(
            position_ids, self.inv_freq, float(self.attention_scaling), x.dtype
        )
        return tables


class SpikingLlamaMLP(LlamaMLP):
    """LLaMA's MLP; its gate runs in one kernel with the encoder of down_proj."""

    def forward(self, x: Tensor | Projected, residual: Tensor | None = None) -> Tensor:
        """Apply the MLP to its input, or to the outputs of gate and up; add a residual, if one is given.

        The product of down_proj adds it, where it can, with the bits of an addition behind it.
        """
        if isinstance(x, Projected):
            sizes = (self.gate_proj.out_features, self.up_proj.out_features)
            gate, up = x.outputs.split(sizes, dim=-1)
        elif not _in_kernels(self, x) or self.config.hidden_act != "silu":
            return _added(residual, super().forward(x))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        from snnllm.kernels.triton.swiglu import silu_mul  # needs Triton

        down = self.down()
        if down is not None:
            return down.gated(gate, up, residual)
        product = silu_mul(gate.flatten(0, -2), up.flatten(0, -2))
        return _added(residual, self.down_proj(product.view(gate.shape)))

    def __getstate__(self) -> dict[str, Any]:
        """State without what is packed for a device, for deepcopy and pickle."""
        return {**self.__dict__, "_down": None}

    def down(self) -> SharedInput | None:
        """What runs SiLU, product and encoder in one kernel."""
        return _packed(self, "_down", (self.down_proj,))


class ProjectedAttention(LlamaAttention):
    """LLaMA's attention, which also takes projections of its input that are there already."""

    def prepare(self) -> None:
        """Do once what reads from the device; nothing here."""

    def forward(
        self,
        hidden_states: Tensor | Projected,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attention of the parent, from the hidden states or from q, k and v."""
        if not isinstance(hidden_states, Projected):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        projected, cache = hidden_states.outputs, kwargs.pop(CACHE_ARGUMENT, None)
        position = kwargs.pop("cache_position", None)
        assert position_embeddings is not None  # transformers' model always gives them
        attended, weights = self._attend(
            projected, position_embeddings, attention_mask, cache, position, **kwargs
        )
        return self.o_proj(attended.reshape(*projected.shape[:-1], -1)), weights

    def _attend(
        self,
        projected: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any,
        position: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output `[B, S, H, D]`, and P if the attention function gives it."""
        query, key, value = self._heads(projected, position_embeddings, cache, position)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended: tuple[Tensor, Tensor | None] = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return attended

    def _heads(
        self,
        projected: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Any,
        position: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the new tokens, keys and values of all, `[B, H, S, D]`."""
        from snnllm.kernels.triton.rotary import rotate_and_store, rotate_heads  # needs Triton

        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        layer = static_layer(cache, self.layer_idx)
        if layer is not None and position is not None:
            query = rotate_and_store(
                *(projected, *position_embeddings, heads, layer.keys, layer.values),
                *(layer.cumulative_length, position),
            )
            return query, layer.keys, layer.values
        query, key = rotate_heads(projected, *position_embeddings, heads, kv_heads)
        value = projected[..., (heads + kv_heads) * self.head_dim :]
        value = value.unflatten(-1, (kv_heads, self.head_dim)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return query, key, value


def static_layer(cache: Any, index: Any) -> Any:
    """The layer of a static cache that kernels may write to: it has its buffers, on the device; or None."""
    if type(cache) is not StaticCache or cache.offloading:
        return None
    layer = cache.layers[index]
    return layer if type(layer) is StaticLayer and layer.is_initialized else None


class SpikingLlamaDecoderLayer(LlamaDecoderLayer):
    """A LLaMA block; where kernels run, its norms encode for the linears behind them."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the block to `[B, S, hidden]`; arguments as those of the parent."""
        norms = (self.input_layernorm, self.post_attention_layernorm)
        if args or not _in_kernels(self, hidden_states) or not _fusable(norms, hidden_states):
            return cast(Tensor, super().forward(hidden_states, *args, **kwargs))
        projections, gates = self.projections(), self.gates()
        if projections is None:
            attended = self.self_attn(hidden_states=norms[0](hidden_states), **kwargs)[0]
        else:
            x, _ = projections.normed(norms[0], hidden_states)
            attended = self.self_attn(hidden_states=x, **kwargs)[0]
        if gates is None:
            residual: Tensor = hidden_states + attended
            return residual + cast(Tensor, self.mlp(norms[1](residual)))
        attended = attended.to(hidden_states.dtype)  # another one under autocast
        x, residual = gates.normed(norms[1], attended, hidden_states)
        return cast(Tensor, self.mlp(x, residual))  # nobody hooks it: `gates`

    def projections(self) -> SharedInput | None:
        """q, k and v as one linear behind the norm; None if they run one by one."""
        if not isinstance(self.self_attn, ProjectedAttention) or hooked(self.self_attn):
            return None
        linears = tuple(getattr(self.self_attn, name) for name in _PROJECTIONS)
        return _packed(self, "_projections", linears)

    def __getstate__(self) -> dict[str, Any]:
        """State without what is packed for a device, for deepcopy and pickle."""
        return {**self.__dict__, "_projections": None, "_gates": None}

    def gates(self) -> SharedInput | None:
        """Gate and up as one linear behind the norm; None if they run one by one."""
        mlp = self.mlp
        if not isinstance(mlp, SpikingLlamaMLP) or mlp.config.hidden_act != "silu" or hooked(mlp):
            return None
        return _packed(self, "_gates", (mlp.gate_proj, mlp.up_proj))


def fuse_block(block: LlamaDecoderLayer) -> None:
    """Give a decoder block, its norms and its MLP the forward functions of this module.

    The modules keep their parameters, names and places.
    """
    block.__class__ = SpikingLlamaDecoderLayer
    block.mlp.__class__ = SpikingLlamaMLP
    fuse_norm(block.input_layernorm)
    fuse_norm(block.post_attention_layernorm)
    if type(block.self_attn) is LlamaAttention:
        block.self_attn.__class__ = ProjectedAttention


def fuse_norm(norm: nn.Module) -> None:
    """Give an RMSNorm of transformers the forward function of this module."""
    norm.__class__ = SpikingRMSNorm


def fuse_rotary(embedding: nn.Module) -> None:
    """Give a rotary embedding of transformers the forward function of this module."""
    embedding.__class__ = SpikingRotaryEmbedding


def prepare(model: nn.Module) -> None:
    """Pack all weights for the device and read all layouts now, instead of in the first forward pass.

    Before `torch.compile`, which cannot pack; `generate` does it by itself.
    """
    packed: set[int] = set()
    device = next(model.parameters()).device
    fused = shared_input.kernels_run_on(device.type)
    for module in model.modules():
        if fused and isinstance(module, SpikingLlamaDecoderLayer):
            mlp: Any = module.mlp
            attention: Any = module.self_attn
            if module.projections() is not None:
                packed |= {id(getattr(attention, name)) for name in _PROJECTIONS}
            if module.gates() is not None:
                packed |= {id(mlp.gate_proj), id(mlp.up_proj)}
                mlp.down()
    for module in model.modules():
        if isinstance(module, SpikingLinear) and id(module) not in packed:
            module.pack()
        elif isinstance(module, ProjectedAttention):
            module.prepare()


def device_bytes(model: nn.Module) -> int:
    """Bytes that a model holds on its device: parameters, buffers, and weights packed for kernels."""
    found: dict[int, int] = {}
    device = next(model.parameters()).device
    for module in model.modules():
        packed = [module.__dict__.get(n) for n in _PACKED]
        for tensor in _tensors([module._parameters, module._buffers, packed]):
            if tensor.device == device:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))


def _added(residual: Tensor | None, y: Tensor) -> Tensor:
    return y if residual is None else residual + y


def _in_kernels(module: nn.Module, x: Tensor) -> bool:
    """Whether kernels, which have no gradient, may run a module on an input."""
    return (
        not module.training
        and not (x.requires_grad and torch.is_grad_enabled())
        and shared_input.kernels_run_on(x.device.type)
        and x.dtype in DTYPES
        and x.numel() > 0
    )


def _fusable(norms: tuple[nn.Module, ...], x: Tensor) -> bool:
    """Whether nobody needs the outputs of norms for themselves."""
    return all(
        isinstance(norm, SpikingRMSNorm) and norm.weight.dtype == x.dtype and not hooked(norm)
        for norm in norms
    )


def _versions(stamp: tuple[Any, ...]) -> list[int]:
    return [version for version, _ in stamp]


def _packed(owner: nn.Module, name: str, linears: tuple[nn.Module, ...]) -> SharedInput | None:
    """The linears packed as one, kept in `owner` until they change."""
    stamp = stamp_of(linears)
    if stamp is None:
        return None
    known = owner.__dict__.get(name)
    if known is None or known[0] != stamp:
        if known is not None and known[1] is not None and _versions(known[0]) == _versions(stamp):
            # Recorded passes may read what another backend drops here: no version has said so.
            for linear in linears:
                cast(SpikingLinear, linear).invalidate()
            stamp = stamp_of(linears)
        known = (stamp, share_input(linears))
        owner.__dict__[name] = known
    return known[1]
