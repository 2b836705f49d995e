r"""Sweep the steps, the salient ratio or the bits of a spike, and measure what each costs.

Example::

    python -m sims.sweep smollm2 --vary steps 1 2 4 --by ratio 0.05 0.1 --windows 4 --output sweep

converts the dense model once per point, measures perplexity on a text beside the dense model, and
the SQNR of the logits of the first window against the dense ones. Writes sweep.csv and sweep.png.
Parameters: steps (T of the salient channels), ratio (fraction of salient channels), bits (b of a
spike, L = 2**b levels), weight-bits. The preset sets what is not varied; T has an effect only with
a ratio above 0, as in W4A4T2.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from sims.charts import plot_sweep
from sims.common import (
    Conversion,
    add_conversion_arguments,
    add_model_argument,
    check_folder,
    converted,
    make_folder,
    read_conversion,
    run_script,
)
from sims.plots import STYLE, new_figure, save_figure
from snnllm.config import SpikeConfig
from snnllm.data import load_text, token_windows, tokenize
from snnllm.evaluate import token_perplexity
from snnllm.modeling import load
from snnllm.sources import Source, dense_model, open_source

__all__ = ["Parameter", "Point", "grid", "measure", "sweep_figure"]


class Parameter(StrEnum):
    """What can be varied."""

    STEPS = "steps"
    RATIO = "ratio"
    BITS = "bits"
    WEIGHT_BITS = "weight-bits"


_FIELDS = {
    Parameter.STEPS: "salient_steps",
    Parameter.RATIO: "salient_ratio",
    Parameter.BITS: "activation_bits",
    Parameter.WEIGHT_BITS: "weight_bits",
}
_NAMES = {
    Parameter.STEPS: "time steps T of the salient channels",
    Parameter.RATIO: "fraction of salient channels",
    Parameter.BITS: "bits b of a spike (L = 2**b levels)",
    Parameter.WEIGHT_BITS: "bits of a weight",
}
_SHORT = {
    Parameter.STEPS: "T",
    Parameter.RATIO: "ratio",
    Parameter.BITS: "b",
    Parameter.WEIGHT_BITS: "weight bits",
}


@dataclass(frozen=True)
class Variation:
    """A parameter and the values it takes.

    Attributes:
        parameter: What is varied.
        values: Its values, at least one.
    """

    parameter: Parameter
    values: tuple[float, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Variation:
        """Read ``["steps", "1", "2", "4"]``.

        Raises:
            ValueError: An unknown parameter, no value, or one that is no number.
        """
        name, *values = words
        known = ", ".join(str(p) for p in Parameter)
        if name not in set(Parameter):
            raise ValueError(f"Cannot vary {name!r}; the parameters are {known}.")
        if not values:
            raise ValueError(f"Give at least one value of {name}, for example: {name} 1 2.")
        try:
            return cls(Parameter(name), tuple(float(v) for v in values))
        except ValueError:
            raise ValueError(f"The values of {name} must be numbers, got {values}.") from None


@dataclass(frozen=True)
class Point:
    """One converted model and its measures.

    Attributes:
        x: Value of the varied parameter.
        series: Name of the series it belongs to, empty if there is one only.
        spike: Its configuration.
        perplexity: Token perplexity; NaN before it is measured.
        sqnr_db: Signal to quantisation noise of the logits against the dense model, dB.
    """

    x: float
    series: str
    spike: SpikeConfig
    perplexity: float = math.nan
    sqnr_db: float = math.nan

    @property
    def mean_bits(self) -> float:
        """Bits of a linear's input: ``b + ratio * log2 T``, 4.1 for T = 2 on 10 %."""
        extra = self.spike.salient_ratio * math.log2(self.spike.salient_steps)
        return self.spike.activation_bits + extra


def grid(preset: str, vary: Variation, by: Variation | None = None) -> list[Point]:
    """The points to measure, checked before anything is converted.

    Args:
        preset: Sets what is not varied, for example ``W4A4T2``.
        vary: The parameter on the x axis.
        by: A second parameter, one series for each value.

    Returns:
        One unmeasured point for each combination.

    Raises:
        ValueError: A value out of range, or both parameters are the same.
    """
    if by is not None and by.parameter is vary.parameter:
        raise ValueError(f"{vary.parameter} is varied twice; give another parameter with --by.")
    base = SpikeConfig.preset(preset)
    series = [None] if by is None else list(by.values)
    points = []
    for value, x in product(series, vary.values):
        changes = {_FIELDS[vary.parameter]: _as_field(vary.parameter, x)}
        label = ""
        if by is not None and value is not None:
            changes[_FIELDS[by.parameter]] = _as_field(by.parameter, value)
            label = f"{_SHORT[by.parameter]} = {value:g}"
        points.append(Point(x, label, dataclasses.replace(base, **changes)))  # type: ignore[arg-type]
    return points


def _as_field(parameter: Parameter, value: float) -> float:
    if parameter is Parameter.RATIO:
        return value
    if value != int(value):
        raise ValueError(f"{parameter} must be a whole number, got {value:g}.")
    return int(value)


def measure(
    points: Sequence[Point], source: Source, windows: Tensor, conversion: Conversion
) -> tuple[list[Point], float]:
    """Convert and measure every point, and measure the dense model.

    Args:
        points: From `grid`.
        source: The dense model.
        windows: Token ids ``[n, W]`` to evaluate on.
        conversion: Calibration of the conversions.

    Returns:
        The points with their measures, and the perplexity of the dense model.
    """
    dense = dense_model(source)
    baseline = token_perplexity(dense, windows).perplexity
    logits = _logits(dense, windows[:1])
    measured = []
    for point in tqdm(points, desc="sweep", unit="point"):
        with converted(source, point.spike, conversion) as folder:
            model = load(folder)
            perplexity = token_perplexity(model, windows).perplexity
            sqnr = _sqnr_db(logits, _logits(model, windows[:1]))
        measured.append(dataclasses.replace(point, perplexity=perplexity, sqnr_db=sqnr))
    return measured, baseline


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _sqnr_db(signal: Tensor, other: Tensor) -> float:
    noise = float((signal - other).double().square().sum())
    return 10 * math.log10(float(signal.double().square().sum()) / noise) if noise else math.inf


def sweep_figure(points: Sequence[Point], parameter: Parameter, baseline: float) -> Figure:
    """Draw perplexity and SQNR of the logits against the parameter."""
    names = dict.fromkeys(point.series for point in points)
    with rc_context(STYLE):
        figure = new_figure(8.4, 3.4)
        left, right = figure.subplots(1, 2)
    for ax, field, label, level in (
        (left, "perplexity", "token perplexity", baseline),
        (right, "sqnr_db", "SQNR of the logits (dB)", None),
    ):
        series = {
            name or "spiking model": [
                (p.x, float(getattr(p, field))) for p in points if p.series == name
            ]
            for name in names
        }
        plot_sweep(series, _NAMES[parameter], label, level, ax)
    values = [baseline, *(point.perplexity for point in points)]
    if max(values) > 5 * min(values):
        left.set_yscale("log")
    return figure


def write_csv(points: Sequence[Point], baseline: float, path: Path) -> Path:
    """Write one row per point and a first one for the dense model; returns the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("weight_bits", "bits", "ratio", "steps", "mean_bits", "perplexity", "sqnr_db")
        )
        writer.writerow(("dense", "", "", "", "", f"{baseline:.6g}", ""))
        for point in points:
            spike = point.spike
            shape = (spike.activation_bits, spike.salient_ratio, spike.salient_steps)
            measures = (f"{point.mean_bits:.4g}", f"{point.perplexity:.6g}", f"{point.sqnr_db:.4g}")
            writer.writerow((spike.weight_bits, *shape, *measures))
    return path


def simulate(
    model: str,
    conversion: Conversion,
    vary: Variation,
    by: Variation | None,
    text: str,
    windows: int,
    window: int,
    output: Path,
) -> list[Path]:
    """Sweep and write the results; arguments as in ``--help``.

    Returns:
        The files that were written.

    Raises:
        ValueError: A value, model or text that cannot be used.
        OSError: The text is missing or the output cannot be written.
    """
    points = grid(conversion.preset, vary, by)
    check_folder(output)
    source = open_source(model)
    ids = token_windows(tokenize(load_text(text), source.tokenizer()), window, windows)
    measured, baseline = measure(points, source, ids, conversion)
    print(f"dense: perplexity {baseline:.4g} on {len(ids)} windows of {window} tokens of {text}")
    for point in measured:
        label = f"{_SHORT[vary.parameter]} = {point.x:g}" + (point.series and f", {point.series}")
        print(f"{label}: perplexity {point.perplexity:.4g}, logits {point.sqnr_db:.2f} dB")
    figure, folder = sweep_figure(measured, vary.parameter, baseline), make_folder(output)
    drawn = save_figure(figure, folder / "sweep.png")
    return [write_csv(measured, baseline, folder / "sweep.csv"), drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit code: 0, or 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sims.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser, only_dense=True)
    form: Any = {"nargs": "+", "metavar": ("PARAMETER", "VALUE")}
    vary, default = "parameter of the x axis and its values", ["steps", "1", "2", "4"]
    parser.add_argument("--vary", default=default, help=f"{vary} (%(default)s)", **form)
    parser.add_argument("--by", help="second parameter and its values, one line each", **form)
    parser.add_argument("--text", default="pydoc:test", help="text to evaluate on (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="windows to read (%(default)s)")
    parser.add_argument("--window", type=int, default=256, help="tokens of each (%(default)s)")
    add_conversion_arguments(parser)
    options = parser.parse_args(argv)

    def run() -> int:
        files = simulate(
            options.model,
            read_conversion(options),
            Variation.parse(options.vary),
            Variation.parse(options.by) if options.by else None,
            options.text,
            options.windows,
            options.window,
            options.output,
        )
        print("\n".join(f"wrote {path}" for path in files))
        return 0

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
