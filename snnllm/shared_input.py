"""Linears that share one encoding of their input: q, k and v, or gate and up, as one integer product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from snnllm.execution import View
from snnllm.hadamard import OnlineRotation
from snnllm.kernels import get_backend
from snnllm.kernels.spec import concatenate
from snnllm.kernels.triton.backend import TritonBackend, TritonLinear, multiply
from snnllm.linear import SpikingLinear

_CAPTURE = "transformers.utils.output_capturing"


@dataclass(frozen=True, eq=False)
class Projected:
    """An input of linears in the form of what they make of it.

    Attributes:
        outputs: Of all linears, one after the other, `[..., N]`.
    """

    outputs: Tensor


@dataclass(frozen=True, eq=False)
class SharedInput:
    """One or more linears, packed as one whose input is encoded in the kernel of what runs before.

    Attributes:
        layer: All outputs, one linear after the other.
        offset: Taken off the input, float32 `[K]`; or None.
        rotation: Channels of the groups that the input is rotated in; or None.
        stamp: `stamp_of` the linears when they were packed.
    """

    layer: TritonLinear
    offset: Tensor | None
    rotation: tuple[int, ...] | None
    stamp: tuple[Any, ...]

    def normed(
        self, norm: Any, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Projected, Tensor]:
        """The outputs for `norm(x + residual)`, and `x + residual`.

        Args:
            norm: An RMSNorm of transformers.
            x: `[..., K]`.
            residual: As x; or None.
        """
        from neurons.backends.triton_encode import EncodedRows  # needs Triton
        from snnllm.kernels.triton.norm import rms_norm_encode

        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        plan = self.layer.plan
        encoded = rms_norm_encode(
            *(rows, added, norm.weight, norm.variance_epsilon, plan.order, plan.segments),
            *(plan.capacities, plan.clip, plan.spec.range_mode, self.offset),
            runs=plan.runs,
        )
        y = multiply(EncodedRows(*encoded[:4]), self.layer, x.dtype)
        return Projected(y.view(*x.shape[:-1], -1)), encoded.residual.view(x.shape)

    def gated(self, gate: Tensor, up: Tensor, residual: Tensor | None = None) -> Tensor:
        """The outputs for `silu(gate) * up`, both `[..., K]`, plus a residual `[..., N]` if one is given."""
        from snnllm.kernels.triton.swiglu import silu_mul_encode  # needs Triton

        plan = self.layer.plan
        encoded = silu_mul_encode(
            *(gate.flatten(0, -2), up.flatten(0, -2), self.rotation, plan.order, plan.segments),
            *(plan.capacities, plan.clip, plan.spec.range_mode, self.offset, plan.runs),
        )
        added = None if residual is None else residual.flatten(0, -2).contiguous()
        return multiply(encoded, self.layer, gate.dtype, added).view(*gate.shape[:-1], -1)


@cache
def _available() -> bool:
    return TritonBackend().available() is None


@torch.compiler.assume_constant_result
def kernels_run_on(device_type: str) -> bool:
    """Whether norms, gates, rotary embeddings and head rotations run in Triton on a device, in every view."""
    return device_type == "cuda" and _available()


def all_hooked() -> bool:
    """Whether somebody watches all modules there are."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes into a module or comes out of it, by hooks or a `forward` of his own.

    transformers leaves hooks in a model that was asked for hidden states or attentions once; they only
    look while a call asks again. accelerate replaces `forward`.
    """
    if all_hooked():
        return True
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", own) is not type(module).forward:
        return True
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(getattr(hook, "__module__", None) != _CAPTURE for hook in hooks)


def stamp_of(modules: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """What must not have changed since some linears were packed; None if they cannot run packed.

    Somebody who hooks a linear or records its neurons wants to see it run.
    """
    stamp = []
    for module in modules:
        if not isinstance(module, SpikingLinear) or module.view is not View.COLLAPSED:
            return None
        if hooked(module):
            return None
        if not torch.compiler.is_compiling() and module.encoder.watched:
            return None
        stamp.append((module.version, module.backend))
    return tuple(stamp)


def share_input(modules: Sequence[nn.Module]) -> SharedInput | None:
    """Pack linears that encode the same input alike; None if they do not or cannot.

    They do with one mask per input (`mask_scope="input"`), which the pipelines `rotated` and, with
    rotation, `omniquant` use by themselves.
    """
    stamp = stamp_of(modules)
    # Ternary linears have kernels of their own, and an order of the columns for each.
    linears = [m for m in modules if type(m) is SpikingLinear and m.runs_in_triton()]
    if stamp is None or len(linears) < len(modules):
        return None
    first = linears[0]
    if any(not _same_input(first, other) for other in linears[1:]):
        return None
    offset = first._buffers.get("offset_input")
    if len(linears) == 1:
        layer: Any = first.prepared()[1]
    else:
        try:
            spec = concatenate([linear.spec() for linear in linears])
        except ValueError:  # other masks: each encodes for itself
            return None
        layer = get_backend(first.backend, first.device).prepare(spec)
        for linear in linears:
            linear.release_codes()
    if not isinstance(layer, TritonLinear):  # prepared before its backend was changed
        return None
    return SharedInput(layer, offset, _rotated_groups(first.rotation), stamp)


def _same_input(one: SpikingLinear, other: SpikingLinear) -> bool:
    """Whether two linears take the same offset off their input and rotate it alike."""
    if one.backend != other.backend:
        return False
    offsets = [linear._buffers.get("offset_input") for linear in (one, other)]
    return _equal(*offsets) and (_rotated_groups(one.rotation) == _rotated_groups(other.rotation))


def _rotated_groups(rotation: OnlineRotation | None) -> tuple[int, ...] | None:
    return None if rotation is None else rotation.sizes


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
