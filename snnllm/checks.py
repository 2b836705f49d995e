"""What `convert` refuses before any work is done."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from snnllm.config import Rotation, SpikeConfig
from snnllm.evaluate import trained_context
from snnllm.head_rotation import MAX_CHANNELS
from snnllm.pipelines.streaming import INPUT_GROUPS
from snnllm.sources import Source


def linear_names(source: Source) -> list[str]:
    """Full names of the linears in the blocks of a model, in order."""
    return [
        f"model.layers.{i}.{path}"
        for i in range(source.config.num_hidden_layers)
        for paths in INPUT_GROUPS
        for path in paths
    ]


def check_names(
    source: Source, spike: SpikeConfig, allocation: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse names that no linear of the model has, and groups that nothing would fill.

    Raises:
        ValueError: A name in `modules_to_not_convert` or `group_steps` that is a typo, or more than
            two groups for a module without an allocation map.
    """
    linears = linear_names(source)
    for name in spike.modules_to_not_convert:
        if not any(linear.endswith(name) for linear in ("lm_head", *linears)):
            raise ValueError(
                f"modules_to_not_convert names {name!r}, but no linear of {source.name} ends like "
                f"that; names look like {linears[0]!r} or 'down_proj'."
            )
    for name, steps in spike.group_steps.items():
        if name not in linears:
            raise ValueError(
                f"group_steps names {name!r}, which is no linear of {source.name}; names look like "
                f"{linears[0]!r}."
            )
        if len(steps) > 2 and name not in (allocation or {}):
            raise ValueError(
                f"group_steps[{name!r}] has {len(steps)} groups, but scores fill two, ordinary and "
                f"salient; say in `allocation` which channels get which of the steps {steps}."
            )


def check_shared_steps(source: Source, spike: SpikeConfig) -> None:
    """Refuse different steps for linears that share one input, which share one encoder.

    Raises:
        ValueError: `group_steps` differ between q/k/v or gate/up of a block.
    """
    for index in range(source.config.num_hidden_layers):
        for paths in INPUT_GROUPS:
            names = [f"model.layers.{index}.{path}" for path in paths]
            steps = {spike.steps_of(name) for name in names}
            if len(steps) > 1:
                raise ValueError(
                    f"group_steps differ between {', '.join(names)}, which read one input; the "
                    f"rotated pipeline encodes it once. Give them the same steps, got {steps}."
                )


def check_rotates(source: Source, spike: SpikeConfig) -> None:
    """Refuse heads whose queries and keys cannot be rotated.

    Raises:
        ValueError: They are too wide.
    """
    config = source.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if spike.encodes_attention and width > MAX_CHANNELS:
        raise ValueError(
            f"{source.name} has heads of {width} channels; Q and K are rotated up to {MAX_CHANNELS}. Use "
            "a pipeline that does not rotate (rtn), or leave the attention operands in float."
        )


def check_windows(windows: Tensor, source: Source) -> None:
    """Refuse calibration windows that the model cannot read, and warn of ones that are too long.

    Raises:
        ValueError: Wrong shape or dtype, no window, longer than the context, or ids outside of the
            vocabulary.
    """
    if windows.dim() != 2 or windows.numel() == 0 or windows.is_floating_point():
        raise ValueError(
            f"windows must be token ids [n, S] with n, S >= 1, got {windows.dtype} of shape "
            f"{tuple(windows.shape)}."
        )
    vocabulary = source.config.vocab_size
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise ValueError(
            f"windows hold token id {int(windows.max())}, but the model has {vocabulary} tokens; "
            "tokenise the text with the tokenizer of this model."
        )
    context = trained_context(source.config)
    if context is not None and windows.shape[1] > context:
        raise ValueError(
            f"calibration windows of {windows.shape[1]} tokens are longer than the context of "
            f"{source.name} ({context}): positions beyond it were never trained; use shorter windows."
        )


def check_converts(source: Source, spike: SpikeConfig) -> None:
    """Refuse a configuration that leaves everything dense.

    Raises:
        ValueError: Every linear is excluded, and the attention is left in float.
    """
    kept = spike.modules_to_not_convert
    if not spike.encodes_attention and all(n.endswith(kept) for n in linear_names(source)):
        raise ValueError(
            "Nothing was converted: every linear is in modules_to_not_convert and the attention "
            "is left in float."
        )


def check_finite(source: Source) -> None:
    """Refuse a broken model, by one pass over its tensors: seconds beside the hours of a conversion.

    Raises:
        ValueError: A tensor holds NaN or infinity; names it.
    """
    for name in sorted(source.names()):
        # Both ends are NaN if any value is; many times faster than `isfinite` of every one.
        if not all(bool(end.isfinite()) for end in source.tensor(name).aminmax()):
            raise ValueError(f"{name} holds NaN or infinite values; the source is broken.")


def check_unfilled(spike: SpikeConfig, pipeline: str) -> None:
    """Refuse what only another pipeline fills; left at its initial values it would be wrong.

    Raises:
        ValueError: Names the fields.
    """
    fields = {
        "rotation": spike.rotation is not Rotation.NONE,
        "input_offset": spike.input_offset,
        "key_offset": spike.key_offset,
        "query_groups": spike.query_groups,
    }
    wrong = [name for name, given in fields.items() if given]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: only the {pipeline} pipeline makes use of this; "
            f"convert with pipeline='{pipeline}'."
        )
