"""Count what a spiking model computes: one run of a prompt, observed at every spiking matmul.

The counts are read off the encoders of the modules, so they are the same in every view. The
definitions stand in `snnllm.operation_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from neurons.functional import signed_events
from snnllm.attention import SPIKING_ATTENTION, SpikingLlamaAttention, spiking_attention
from snnllm.cache import from_payload
from snnllm.config import FLOAT_BITS
from snnllm.execution import View, spiking_modules, use_view
from snnllm.kernels.spec import LinearSpec
from snnllm.linear import SpikingLinear
from snnllm.modeling import SpikingLlamaForCausalLM
from snnllm.operation_report import (
    FloatPart,
    Kind,
    OperationReport,
    OperationRow,
    SpikeStatistics,
)
from snnllm.operation_rows import AttentionCall, float_attention_rows, linear_row

__all__ = [
    "CrossCheck",
    "FloatPart",
    "Kind",
    "OperationReport",
    "OperationRow",
    "SpikeStatistics",
    "count_operations",
    "cross_check",
    "linear_row",
]

_COUNTED_ATTENTION = "spiking_counted"


def count_operations(
    model: SpikingLlamaForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None
) -> OperationReport:
    """Run prompts once and count the operations of every spiking matmul.

    Args:
        model: A spiking LLaMA, in any view.
        input_ids: Token ids `[B, S]`, or `[S]` for one prompt.
        attention_mask: 1 for tokens and 0 for padding, `[B, S]`. Padding is left out of all counts.

    Returns:
        The report.

    Raises:
        ValueError: Nothing in the model is spiking, or the ids or the mask have a wrong shape.
    """
    ids, keep = _check_prompt(model, input_ids, attention_mask)
    rows: list[OperationRow] = []
    parts: list[FloatPart] = []
    with _attention_counted(model.config), _observed(model, keep, rows, parts):
        _run(model, ids, keep.long())
    tokens = int(keep.sum())
    scores = sum(row.macs // row.fan_in for row in rows if row.kind is Kind.QK)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return OperationReport(
        label=model.config.spike.label,
        sequences=ids.shape[0],
        tokens=tokens,
        rows=tuple(rows),
        float_parts=(
            *parts,
            *_elementwise_parts(model, tokens, scores),
            *_rotation_parts(model, tokens),
        ),
        parameter_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


def _run(model: SpikingLlamaForCausalLM, ids: Tensor, mask: Tensor) -> None:
    """One pass without the head (its MACs follow from its shape), in evaluation mode."""
    training = model.training
    model.eval()
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` numbers padded rows
    try:
        with torch.no_grad():
            model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        model.train(training)


def _check_prompt(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not spiking_modules(model):
        raise ValueError("The model has no spiking modules to count; make one with snnllm.convert.")
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(
            f"input_ids must be token ids [B, S] or [S], not empty, got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    mask = mask.unsqueeze(0) if mask.dim() == 1 else mask
    if mask.shape != ids.shape or not bool(mask.bool().any(1).all()):
        raise ValueError(
            f"attention_mask must be 0 or 1 of shape {tuple(ids.shape)} with a token in every row, "
            f"got shape {tuple(mask.shape)}."
        )
    device = next(model.parameters()).device
    return ids.to(device), mask.bool().to(device)


@contextmanager
def _observed(
    model: nn.Module, keep: Tensor, rows: list[OperationRow], parts: list[FloatPart]
) -> Iterator[None]:
    """Append a row or a part for every matmul that runs inside the block."""

    def linear(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, SpikingLinear):
                rows.append(linear_row(name, module, args[0][keep]))
            elif isinstance(module, nn.Linear):
                macs = int(keep.sum()) * module.in_features * module.out_features
                parts.append(FloatPart(name, macs, "tokens x in x out, not converted"))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, SpikingLinear | nn.Linear):
                handle = module.register_forward_pre_hook(linear(name))
                stack.callback(handle.remove)
            elif isinstance(module, LlamaAttention):
                stack.enter_context(_observed_attention(name, module, keep, rows))
        yield


@contextmanager
def _observed_attention(
    name: str, module: LlamaAttention, keep: Tensor, rows: list[OperationRow]
) -> Iterator[None]:
    if isinstance(module, SpikingLlamaAttention):
        q, k, v = module.q_encoder, module.k_encoder, module.v_encoder

        def observe(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
            key_row, value_row = from_payload(key, k.layout), from_payload(value, v.layout)
            encodings = q.encode(module.rotate(query)), key_row, value_row
            call = AttentionCall(name, *encodings, visible=_visible(mask, keep), keep=keep)
            rows.extend(call.rows(module))

        module.__dict__["attention_observer"] = observe
        try:
            yield
        finally:
            del module.__dict__["attention_observer"]
        return

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        config: Any = module.config
        visible = _visible(kwargs.get("attention_mask"), keep)
        heads, head_dim = config.num_attention_heads, int(config.head_dim)
        rows.extend(float_attention_rows(name, visible, heads, head_dim))

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _counted_attention(
    module: SpikingLlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Spiking attention that shows its operands to the module's `attention_observer`."""
    module.__dict__["attention_observer"](query, key, value, attention_mask)
    return spiking_attention(module, query, key, value, attention_mask, *args, **kwargs)


@contextmanager
def _attention_counted(config: Any) -> Iterator[None]:
    """Let transformers call `_counted_attention` wherever it calls the spiking attention.

    Q, K and V exist only between RoPE and their product, however that is executed; the attention
    function is the one place where all executions receive them.
    """
    before = config._attn_implementation
    if before != SPIKING_ATTENTION:
        yield
        return
    AttentionInterface.register(_COUNTED_ATTENTION, _counted_attention)
    AttentionMaskInterface.register(_COUNTED_ATTENTION, eager_mask)
    config._attn_implementation = _COUNTED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _visible(mask: Tensor | None, keep: Tensor) -> Tensor:
    """Which query sees which key, bool `[B, S, S]`, without padding."""
    length = keep.shape[1]
    if mask is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril()[None]
    else:
        mask = mask[:, 0, :, :length]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen & keep[:, :, None] & keep[:, None, :]


def _elementwise_parts(model: SpikingLlamaForCausalLM, tokens: int, scores: int) -> list[FloatPart]:
    """What runs in float besides matmuls; a transcendental function counts as one multiplication.

    Args:
        model: The model.
        tokens: Tokens without padding.
        scores: Attention scores, over all heads and blocks.
    """
    c = model.config
    blocks, hidden = c.num_hidden_layers, c.hidden_size
    rotated = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    bits = c.spike.embedding_bits
    weights = "" if bits == FLOAT_BITS else f", weights of {bits} bits"
    return [
        FloatPart("lm_head", tokens * hidden * c.vocab_size, f"logits of every token{weights}"),
        FloatPart("embedding", 0, "a lookup"),
        FloatPart(
            "RMSNorm", 3 * tokens * hidden * (2 * blocks + 1), "square, normalise, scale: 3 a value"
        ),
        FloatPart("RoPE", 2 * tokens * rotated * blocks, "2 a value of Q and K"),
        FloatPart("softmax", 3 * scores, "scale, exponential, normalise: 3 a visible score"),
        FloatPart(
            "SwiGLU", 3 * tokens * c.intermediate_size * blocks, "sigmoid, SiLU, gate: 3 a value"
        ),
    ]


def _rotation_parts(model: SpikingLlamaForCausalLM, tokens: int) -> list[FloatPart]:
    """Online rotations of a rotated model; the folded ones cost nothing."""
    down = heads = 0
    for module in model.modules():
        if isinstance(module, SpikingLinear) and module.rotation is not None:
            down += tokens * module.rotation.macs
        elif isinstance(module, SpikingLlamaAttention) and module.qk_rotation is not None:
            c: Any = module.config
            rows = tokens * (c.num_attention_heads + c.num_key_value_heads)
            heads += rows * module.qk_rotation.macs
    parts = [
        FloatPart("rotation of down_proj inputs", down, "K log2 p additions a token, as it runs"),
        FloatPart("rotation of Q and K", heads, "D log2 p additions a head and token, as it runs"),
    ]
    return [part for part in parts if part.macs]


@dataclass(frozen=True)
class CrossCheck:
    """Our counts of one linear beside those of SpikingJelly's `SynOpCounter`.

    Attributes:
        unary: Additions on the unsigned unary code, ours.
        unary_counted: Counted by SpikingJelly while the layer runs in the binary view.
        signed: Additions on the signed re-encoding, ours.
        signed_counted: Counted by SpikingJelly on the signed event trains times the weight.
        sums_agree: Whether the signed trains give the accumulators of the layer exactly.
    """

    unary: int
    unary_counted: int
    signed: int
    signed_counted: int
    sums_agree: bool

    @property
    def agrees(self) -> bool:
        """Whether the counts and the sums are equal."""
        equal = self.unary == self.unary_counted and self.signed == self.signed_counted
        return equal and self.sums_agree


def _centred_levels(spec: LinearSpec) -> Tensor:
    """Weight levels less their zero points, int32 `[N, K]` in encoded order."""
    zero = [spec.zero[:, [s.weight_group]].expand(-1, s.stop - s.start) for s in spec.segments]
    return spec.levels.to(torch.int32) - torch.cat(zero, 1)


def _signed_sums(module: SpikingLinear, x: Tensor) -> Tensor:
    """Sums over the signed event trains, one matmul per group, slot and sign, float64 `[tokens, N]`.

    In units where the thresholds are commensurate, as the accumulators of the layer.
    """
    encoding = module.encoder.encode(module.encoder_input(x))
    centred = module.encoder.centre(encoding)[:, module.order]
    weight = _centred_levels(module.spec()).double().T
    channel_group = module.encoder.channel_group[module.order]
    total = torch.zeros(len(x), module.out_features, dtype=torch.float64, device=x.device)
    for group, capacity in enumerate(module.encoder.capacities):
        multiple = 1 if encoding.multiple is None else encoding.multiple[:, group, None]
        own = torch.where(channel_group == group, centred, 0)
        for plus, minus in zip(*signed_events(own, capacity), strict=True):
            part = torch.mm(plus.double(), weight) - torch.mm(minus.double(), weight)
            total += multiple * part
    return total


def cross_check(module: SpikingLinear, x: Tensor) -> CrossCheck:
    """Let SpikingJelly count the synaptic operations of a linear, and compare.

    `SynOpCounter` takes a matmul for spiking if one operand is in {0, 1}; a weight that happens to
    be all 0 and 1 would be taken for spikes too.

    Args:
        module: A linear with encoded input and integer weight.
        x: Input `[tokens, K]`.

    Returns:
        Both counts.

    Raises:
        ValueError: The layer has a float operand, so its sum is not one of events.

    Source: SpikingJelly 2.0, `op_counter`.
    """
    if FLOAT_BITS in (module.layout.activation_bits, module.layout.weight_bits):
        raise ValueError(f"{module.name}: a float operand leaves no integer events to check.")
    row = linear_row(module.name, module, x)
    unary_counter, signed_counter = SynOpCounter(), SynOpCounter()
    with torch.no_grad():
        with use_view(module, View.BINARY), DispatchCounterMode([unary_counter]):
            expected = module.accumulators(x).sum(0)
        with DispatchCounterMode([signed_counter]):
            total = _signed_sums(module, x)
    return CrossCheck(
        unary=row.unary_operations,
        unary_counted=unary_counter.get_total(),
        signed=row.synaptic_operations,
        signed_counted=signed_counter.get_total(),
        sums_agree=bool(torch.equal(total, expected.double())),
    )
