"""What of a spiking configuration one linear needs; fixes the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from snnllm.config import Rotation, SpikeConfig
from snnllm.step_allocation import StepClass


@dataclass(frozen=True)
class LinearLayout:
    """What of a `SpikeConfig` one linear needs; fixes the shapes of its tensors.

    Attributes:
        weight_bits: 2..8, or 16 for a float weight.
        activation_bits: Bits of a spike, or 16 for a float input.
        steps: Steps of the channel groups.
        value_range: `split`, `shared` or `commensurate`.
        capacity: `steps` or `power_of_two`.
        group_size: Input channels (in encoded order) that share a weight scale, or None.
        segment_scales: Whether every channel group has weight scales of its own.
        classes: Steps and numbers of columns of a ternary weight, steps ascending; empty for levels.
        offset: Whether a fixed offset is taken from the input, and its image added to the output.
        rotated: Salient ratio of an online rotation in front of the encoder, or None.
        clip: Factor on the range of a token.
    """

    weight_bits: int
    activation_bits: int
    steps: tuple[int, ...]
    value_range: str
    capacity: str
    group_size: int | None
    rotated: float | None = None
    clip: float = 1.0
    segment_scales: bool = False
    offset: bool = False
    classes: tuple[StepClass, ...] = ()

    @classmethod
    def of(cls, config: SpikeConfig, module: str) -> LinearLayout:
        """The layout of the linear called `module`."""
        steps = config.steps_of(module) if config.encodes_activations else (1,)
        return cls(
            config.weight_bits,
            config.activation_bits,
            steps,
            str(config.value_range),
            str(config.capacity),
            config.weight_group_size,
            config.salient_ratio if _needs_online_rotation(config, module) else None,
            config.activation_clip,
            config.segment_scales,
            config.input_offset,
            tuple(StepClass(*c) for c in config.weight_columns.get(module, ())),
        )


def _needs_online_rotation(config: SpikeConfig, module: str) -> bool:
    """Only the input of down_proj has no linear in front of it that could hold the rotation."""
    return config.rotation is Rotation.GROUPS and module.endswith("down_proj")
