"""A row of a table: how a model is made from the dense one, and what is measured on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.config import SpikeConfig
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import Execution, OmniQuantOptions, Recipe, recipe_config
from snnllm.pipelines.start import Options, options_of
from snnllm.sources import Source

__all__ = [
    "Baseline",
    "Conversion",
    "Line",
    "Measure",
    "Record",
    "Row",
    "Table",
    "Training",
    "settings_digest",
    "spikellm",
]

Record = Mapping[str, Any]
"""What is known about the model of a row: `conversion`, `model`, `measures`, `errors`."""

Line = dict[str, Any]
"""One line of a table: values by the name of their column; None where nothing was measured."""


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Ten digits, equal for equal settings (JSON types), for the names of files."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Measure(StrEnum):
    """What can be measured on the model of a row.

    Attributes:
        PERPLEXITY: Token perplexity on every evaluation text.
        SAMPLE: The same on the first text and fewer windows, for tables that compare many variants.
        TASKS: The zero-shot tasks.
        OPERATIONS: Spikes, synaptic operations, ACE and energy of a prompt.
        EQUIVALENCE: Whether the views give the same integers and logits.
        SPEED: Prefill and decoding of every view beside the dense model.
        SALIENCY_MAP: A figure of the scores with the salient channels.
        RASTER: Figures of the spikes and membranes of a group of neurons.
    """

    PERPLEXITY = "perplexity"
    SAMPLE = "sample"
    TASKS = "tasks"
    OPERATIONS = "operations"
    EQUIVALENCE = "equivalence"
    SPEED = "speed"
    SALIENCY_MAP = "saliency_map"
    RASTER = "raster"


@dataclass(frozen=True)
class Training:
    """How the rows that are trained are trained, where it differs from the recipe.

    Attributes:
        epochs: Passes over the calibration windows; None as the recipe says (20 in the paper).
        batch: Windows of a training step; None as the recipe says (1).
        execution: How a training step runs; None as the recipe says.
    """

    epochs: int | None = None
    batch: int | None = None
    execution: Execution | None = None

    def applied(self, options: OmniQuantOptions) -> OmniQuantOptions:
        """The options with these changes."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(options, **given)

    def options(self, recipe: Recipe) -> OmniQuantOptions:
        """The options of a recipe with these changes."""
        return self.applied(OmniQuantOptions.recipe(recipe))


@dataclass(frozen=True)
class Conversion:
    """How a dense model becomes a spiking one.

    Attributes:
        pipeline: The pipeline.
        spike: The spiking configuration.
        options: Options of the pipeline; None for its defaults.
    """

    pipeline: Pipeline
    spike: SpikeConfig
    options: Options | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides about the checkpoint, apart from model and data; JSON types."""
        options = options_of(self.pipeline, self.options)
        return {
            "pipeline": str(self.pipeline),
            "spike": self.spike.to_dict(),
            "options": None if options is None else dataclasses.asdict(options),
        }

    @property
    def name(self) -> str:
        """A file name, equal for equal conversions."""
        return f"{self.pipeline}-{self.spike.label}-{settings_digest(self.to_dict())}"


@dataclass(frozen=True)
class Baseline:
    """A float model made from the dense one without a checkpoint: weights that another method rounds.

    Attributes:
        name: A file name; other settings need another one.
        settings: What decides about the model, apart from the dense one and data; JSON types.
        build: From the source, calibration windows `[n, S]`, seed and device to the model and what is
            to be known about it (JSON types; `mean_steps` is shown).
    """

    name: str
    settings: Mapping[str, Any]
    build: Callable[[Source, Tensor, int, torch.device], tuple[nn.Module, dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dict(self.settings)


def spikellm(preset: str, training: Training, **fields: Any) -> Conversion:
    """The published recipe: OmniQuant around spikes, with the given salient channels.

    Args:
        preset: Such as `W4A4T2`; without `T` it is OmniQuant on the same code.
        training: How it is trained.
        fields: Fields of `SpikeConfig` that differ from the recipe.
    """
    spike = recipe_config(Recipe.PAPER, preset, **fields)
    return Conversion(Pipeline.OMNIQUANT, spike, training.options(Recipe.PAPER))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: The method, as the table prints it.
        bits: Precision, such as `W4A4`; `FP` for the dense model.
        conversion: How the model is made; None for the dense one.
        quick: Whether the row belongs to the short run of `--quick`.
        extra: What is measured besides the measures of the table.
        published: Name of the method in the list of published values; None if there are none.
    """

    label: str
    bits: str
    conversion: Conversion | Baseline | None
    quick: bool = False
    extra: tuple[Measure, ...] = ()
    published: str | None = None

    @property
    def name(self) -> str:
        """Name of the model; rows with the same model are measured once."""
        return "float" if self.conversion is None else self.conversion.name

    @property
    def title(self) -> str:
        """Label and precision."""
        return f"{self.label}, {self.bits}"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: As the command line calls it.
        title: Heading.
        rows: Its rows.
        measures: What is measured on every row.
        lines: Makes the lines from the rows with their records.
        formats: Format of the numbers by column, such as `.2f`; `.4g` for a column without one.
        note: What a reader must know, below the table.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...]
    lines: Callable[[Sequence[tuple[Row, Record]]], list[Line]]
    formats: Mapping[str, str]
    note: str

    def measures_of(self, row: Row) -> tuple[Measure, ...]:
        """What is measured on one row."""
        return (*self.measures, *row.extra)

    def chosen(self, quick: bool, names: Sequence[str]) -> Table:
        """The table with fewer rows: those of the short run, or whose title contains a name."""
        rows = [row for row in self.rows if row.quick or not quick]
        if names:
            rows = [row for row in rows if any(n.lower() in row.title.lower() for n in names)]
        return dataclasses.replace(self, rows=tuple(rows))
