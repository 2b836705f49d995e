"""The spiking configuration: which operands are encoded, with how many bits and steps, and how it is serialised."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from neurons import Capacity as Capacity
from neurons import ValueRange as ValueRange
from neurons import spike_capacity
from neurons.modes import check_commensurate
from snnllm.config_fields import check_int, member, number, plain
from snnllm.step_budget import MAX_STEPS, SCORED_STEPS

SCHEMA_VERSION = 4
MAX_GROUPS = 64
"""Activation groups of a layer: the kernels are told by a 64-bit mask which of them are active."""
GROUP_SIZE = 128
"""Columns of ternary weights that share a threshold."""
FLOAT_BITS = 16
"""Bit width that stands for "left in floating point" (`W16`: float weights, `A16`: float activations)."""

_PRESET = re.compile(r"^(?:W(?P<w>\d+)|TW(?P<m>\d+(?:\.\d+)?))?A(?P<a>\d+)(?:T(?P<t>\d+))?$")
_RATIO_OF_STEPS = {1: 0.0, 2: 0.10, 4: 0.05}
_TERNARY_BITS = 2
PRESETS = (
    "W4A4T2",
    "W4A4T4",
    "W4A4",
    "W4A8",
    "W2A8",
    "W8A8",
    "A4T2",
    "A4",
    "TW1.4A16",
    "TW1.4A4T2",
)
"""Examples of preset names; any `W<bits>A<bits>T<steps>` is understood, and `TW<mean steps>` for
weights that are ternary spike trains."""


class Score(StrEnum):
    """Saliency scores of method.md section 4."""

    FIRST_ORDER = "first_order"
    ABS = "abs"
    GAUSS_NEWTON = "gauss_newton"
    MAX_ABS = "max_abs"
    HESSIAN = "hessian"
    RANDOM = "random"


WEIGHT_SCORES = (Score.HESSIAN, Score.GAUSS_NEWTON, Score.RANDOM)
"""Scores of weight columns."""


class MaskScope(StrEnum):
    """One mask per linear (the paper), or one for all linears that share an input (q/k/v, gate/up)."""

    LINEAR = "linear"
    INPUT = "input"


class WeightRange(StrEnum):
    """Range of a weight row: its minimum and maximum, or clipped to the least output error."""

    MINMAX = "minmax"
    CLIP = "clip"


class Rotation(StrEnum):
    """Whether channels are rotated inside their saliency groups (snnllm/transforms.py)."""

    NONE = "none"
    GROUPS = "groups"


class Operands(StrEnum):
    """Whether the attention operands Q, K and V are encoded to spikes or left in float."""

    ENCODED = "encoded"
    FLOAT = "float"


@dataclass(frozen=True)
class SpikeConfig:
    """What a spiking LLaMA computes, independent of how it was calibrated.

    Attributes:
        weight_bits: Bits of a weight level, 2..8, or 16 for float weights.
        activation_bits: Bits `b` of one multi-level spike (`L = 2**b`), 1..8, or 16 for float activations.
        salient_ratio: Fraction `p` of the channels of an operand that is salient, in [0, 1].
        salient_steps: Time steps `T` of the salient channels of a linear input.
        kv_salient_steps: Time steps of the salient channels of K and V (method.md section 4: always 2).
        value_range: Own threshold per channel group (`split`), one range for all (`shared`), or own
            thresholds rounded up to multiples of one unit per token (`commensurate`), so that a linear
            whose weight has one group has one integer sum. Q, K and V keep `split` then.
        capacity: `steps` (exact in every view) or `power_of_two` (published fake-quantised numbers only).
        score: Saliency score that ranks the channels.
        mask_scope: One mask per linear or per shared input.
        attention: Encode Q, K and V, or leave the attention operands in float.
        weight_range: Weight ranges from min/max or from a clip search.
        rotation: Rotate channels inside the saliency groups. This and the next four are set by the pipelines
            `rotated` and `omniquant`.
        input_offset: Linears take a fixed offset per channel from their input and add its image to the
            output.
        key_offset: A fixed offset per channel is taken off K in front of its encoder, which the softmax
            does not see.
        segment_scales: Every saliency group of the inputs has weight scales of its own.
        query_groups: Q has the channel groups and steps of K; otherwise one group and one step.
        activation_clip: Factor on the range of a token in (0, 1]; below 1 the largest values saturate.
        weight_group_size: Input channels that share one weight scale; None for one scale per output channel.
            Of ternary weights: columns with the same number of steps that share a threshold.
        mean_steps: Time steps of a weight on average, for weights that are ternary spike trains
            (method.md section 6; `weight_bits` is then 2, those of a ternary spike); None for levels.
        weight_columns: Steps and numbers of columns, `((T, columns), ...)` with T ascending, of the
            ternary linears; set by the pipeline, which finds them.
        embedding_bits: Bits of the token embedding and the output head: 8, one scale for each token
            (`snnllm.vocabulary`), or 16 for float tables.
        modules_to_not_convert: Names (suffixes) of linears that stay dense; the head always does (`embedding_bits`).
        group_steps: Steps of the channel groups of single modules, for explicit allocation maps.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    salient_ratio: float = 0.10
    salient_steps: int = 2
    kv_salient_steps: int = 2
    value_range: ValueRange = ValueRange.SPLIT
    capacity: Capacity = Capacity.STEPS
    score: Score = Score.FIRST_ORDER
    mask_scope: MaskScope = MaskScope.LINEAR
    attention: Operands = Operands.ENCODED
    weight_range: WeightRange = WeightRange.CLIP
    rotation: Rotation = Rotation.NONE
    input_offset: bool = False
    key_offset: bool = False
    segment_scales: bool = False
    query_groups: bool = False
    activation_clip: float = 1.0
    weight_group_size: int | None = None
    mean_steps: float | None = None
    weight_columns: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    embedding_bits: int = FLOAT_BITS
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    group_steps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, enum in _ENUMS.items():
            object.__setattr__(self, name, member(enum, name, getattr(self, name)))
        names: object = self.modules_to_not_convert
        if isinstance(names, str):  # as a tuple it would be the suffixes "q", "_", ...
            raise TypeError(
                f"modules_to_not_convert must be a sequence of names, got the string "
                f"{self.modules_to_not_convert!r}."
            )
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))
        steps = {k: tuple(int(t) for t in v) for k, v in dict(self.group_steps).items()}
        object.__setattr__(self, "group_steps", steps)
        check_int("weight_bits", self.weight_bits, 2, 8, FLOAT_BITS)
        check_int("activation_bits", self.activation_bits, 1, 8, FLOAT_BITS)
        check_int("embedding_bits", self.embedding_bits, 8, 8, FLOAT_BITS)
        check_int("salient_steps", self.salient_steps, 1, 64)
        check_int("kv_salient_steps", self.kv_salient_steps, 1, 64)
        for name in ("salient_ratio", "activation_clip"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if not 0.0 <= self.salient_ratio <= 1.0:
            raise ValueError(
                f"salient_ratio is a fraction of the channels in [0, 1], got {self.salient_ratio}."
            )
        if not 0.0 < self.activation_clip <= 1.0:
            raise ValueError(f"activation_clip must lie in (0, 1], got {self.activation_clip}.")
        if self.segment_scales and self.weight_group_size is not None:
            raise ValueError(
                "segment_scales gives every saliency group its own weight scales; "
                "weight_group_size must be None with it."
            )
        if self.weight_group_size is not None:
            check_int("weight_group_size", self.weight_group_size, 8, 1 << 20)
        if self.weight_bits == FLOAT_BITS and self.activation_bits == FLOAT_BITS:
            raise ValueError(
                "weight_bits=16 with activation_bits=16 leaves the model dense: nothing would be "
                "converted. Choose at most 8 bits for one of them."
            )
        self._check_ternary()
        _check_group_steps(steps)
        if self.value_range is ValueRange.COMMENSURATE:
            self._check_commensurate()
        if self.capacity is Capacity.POWER_OF_TWO:
            self._check_powers()

    def _check_ternary(self) -> None:
        """Check and normalise what describes ternary weights."""
        columns = {
            name: tuple((int(steps), int(count)) for steps, count in classes)
            for name, classes in dict(self.weight_columns).items()
        }
        object.__setattr__(self, "weight_columns", columns)
        if self.mean_steps is None:
            if columns:
                raise ValueError("weight_columns describes ternary weights; give mean_steps too.")
            return
        object.__setattr__(self, "mean_steps", number("mean_steps", self.mean_steps))
        if not 1.0 <= self.mean_steps <= MAX_STEPS:
            raise ValueError(
                f"mean_steps must be in 1..{SCORED_STEPS}, or up to {MAX_STEPS} with two classes of columns "
                f"(salient_steps, --salient-column-steps), got {self.mean_steps}."
            )
        if self.weight_bits != _TERNARY_BITS or self.segment_scales:
            raise ValueError(
                "mean_steps makes the weights ternary spike trains: weight_bits must be 2 and "
                f"segment_scales False, got {self.weight_bits} and {self.segment_scales}. The preset "
                "TW1.4A16 sets them."
            )
        for name, classes in columns.items():
            steps = [t for t, _ in classes]
            if (
                not steps
                or steps != sorted(set(steps))
                or not 1 <= steps[0] <= steps[-1] <= MAX_STEPS
            ):
                raise ValueError(
                    f"weight_columns[{name!r}] must hold (steps, columns) with steps ascending in "
                    f"1..{MAX_STEPS}, got {classes}."
                )

    def _check_powers(self) -> None:
        """Refuse steps that have no capacity `2**(b + log2 T) - 1`."""
        named: dict[str, tuple[int, ...]] = {
            "salient_steps": (self.salient_steps,),
            "kv_salient_steps": (self.kv_salient_steps,),
        }
        named |= {f"group_steps[{name!r}]": steps for name, steps in self.group_steps.items()}
        for name, steps in named.items():
            for t in steps:
                if t & (t - 1):
                    raise ValueError(
                        f"capacity='power_of_two' needs steps 1, 2, 4, ..., got {name}={t}; use "
                        "capacity='steps'."
                    )

    def _check_commensurate(self) -> None:
        """Refuse ternary weights and channel groups that have no commensurate thresholds."""
        if self.mean_steps is not None:
            raise ValueError(
                "value_range='commensurate' needs weight levels with one sum per linear; ternary "
                "weights have thresholds per run of columns. Use value_range='split'."
            )
        if not self.encodes_activations:
            return
        for name, steps in {"linears": self.steps_of(""), **self.group_steps}.items():
            capacities = [spike_capacity(t, self.activation_bits, self.capacity) for t in steps]
            check_commensurate(capacities, name)

    def __hash__(self) -> int:
        """Equal configs are equal keys, the mapping `group_steps` included."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("group_steps", "weight_columns"):
            values[name] = frozenset(values[name].items())
        return hash(tuple(values.items()))

    @property
    def encodes_activations(self) -> bool:
        """Whether the inputs of the linears become spikes."""
        return self.activation_bits != FLOAT_BITS

    @property
    def encodes_attention(self) -> bool:
        """Whether Q, K and V become spikes."""
        return self.encodes_activations and self.attention is Operands.ENCODED

    def steps_of(self, module: str) -> tuple[int, ...]:
        """Steps of the channel groups of one linear's input, ordinary group first."""
        if module in self.group_steps:
            return self.group_steps[module]
        return (1,) if self.salient_ratio == 0.0 else (1, self.salient_steps)

    @property
    def may_scale_segments(self) -> bool:
        """Whether pipelines may set `segment_scales`, which take the one sum of commensurate inputs."""
        one_sum = self.value_range is ValueRange.COMMENSURATE
        return self.weight_group_size is None and not one_sum

    @property
    def attention_range(self) -> ValueRange:
        """Range of Q, K and V: their products have a scale per group, so units would save nothing."""
        commensurate = self.value_range is ValueRange.COMMENSURATE
        return ValueRange.SPLIT if commensurate else self.value_range

    @property
    def kv_steps(self) -> tuple[int, ...]:
        """Steps of the channel groups of K and V."""
        return (1,) if self.salient_ratio == 0.0 else (1, self.kv_salient_steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form with the schema version; inverse of `from_dict`."""
        out: dict[str, Any] = {"quant_method": "spikellm", "schema_version": SCHEMA_VERSION}
        for f in dataclasses.fields(self):
            out[f.name] = plain(getattr(self, f.name))
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpikeConfig:
        """Read `to_dict`'s form.

        Raises:
            ValueError: Wrong quant_method, another schema version, or an unknown key.
        """
        values = dict(data)
        method = values.pop("quant_method", "spikellm")
        version = values.pop("schema_version", SCHEMA_VERSION)
        if str(method) != "spikellm":
            raise ValueError(f"quant_method 'spikellm' expected, got {str(method)!r}.")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"This checkpoint has spiking schema version {version}; this snnllm reads version "
                f"{SCHEMA_VERSION}. Install the snnllm release that wrote it, or convert again."
            )
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"Unknown spiking config keys: {', '.join(unknown)}.")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SpikeConfig:
        """Build a config from a name such as `W4A4T2`; `overrides` replace single fields.

        `W` is the weight width (float if absent), `TW` the mean steps of weights that are ternary spike
        trains (with thresholds for groups of 128 columns), `A` the bits of one spike (16: float), `T` the steps of the
        salient channels. The ratio follows method.md section 4: T = 2 on 10 %, T = 4 on 5 % (both
        4.1 bits on average at A4), no salient channels without T.

        Raises:
            ValueError: The name is not of that form, or a field is out of range.
        """
        match = _PRESET.match(name.strip().upper())
        if match is None:
            raise ValueError(
                f"Unknown preset {name!r}. Presets look like W<bits>A<bits>T<steps>, for example "
                f"{', '.join(PRESETS)}."
            )
        weight, mean, steps = match["w"], match["m"], int(match["t"] or 1)
        check_int("T (salient steps)", steps, 1, 64)
        if int(match["a"]) == FLOAT_BITS and steps > 1:
            raise ValueError(
                f"Preset {name!r} asks for {steps} time steps of float activations, which have none; "
                f"leave T out, or choose at most 8 bits after A."
            )
        values: dict[str, Any] = {
            "weight_bits": FLOAT_BITS if weight is None else int(weight),
            "activation_bits": int(match["a"]),
            "salient_steps": steps,
            "salient_ratio": _RATIO_OF_STEPS.get(steps, 0.10),
        }
        if mean is not None or (weight is None and overrides.get("mean_steps") is not None):
            ternary = {"weight_bits": _TERNARY_BITS, "weight_group_size": GROUP_SIZE}
            values |= {**ternary, "mean_steps": float(mean or 1.0)}
        return cls(**{**values, **overrides})

    @property
    def label(self) -> str:
        """Short name such as `W4A4T2`, for tables and file names."""
        weight = "" if self.weight_bits == FLOAT_BITS else f"W{self.weight_bits}"
        if self.mean_steps is not None:
            weight = f"TW{self.mean_steps:g}"
        steps = f"T{self.salient_steps}" if self.salient_ratio > 0 else ""
        return f"{weight}A{self.activation_bits}{steps}"


_ENUMS: dict[str, type[StrEnum]] = {
    "value_range": ValueRange,
    "capacity": Capacity,
    "score": Score,
    "mask_scope": MaskScope,
    "attention": Operands,
    "weight_range": WeightRange,
    "rotation": Rotation,
}


def _check_group_steps(steps: Mapping[str, tuple[int, ...]]) -> None:
    for name, values in steps.items():
        if not values or min(values) < 1:
            raise ValueError(f"group_steps[{name!r}] must hold steps >= 1, got {values}.")
        if len(values) > MAX_GROUPS:
            raise ValueError(
                f"group_steps[{name!r}] must hold at most {MAX_GROUPS} groups, got {len(values)}."
            )
