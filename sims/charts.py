"""Figures of whole models: firing rates, agreement of the views, sweeps. See `sims.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from sims.plots import GREY, ORDINARY, SALIENT, STYLE, new_axes, new_figure
from sims.traces import LayerTrace

__all__ = [
    "equivalence_figure",
    "firing_rate",
    "plot_difference",
    "plot_integers",
    "plot_rate_heatmap",
    "plot_rate_histogram",
    "plot_sweep",
    "rate_figure",
]

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_FLOAT32_EPS = 2.0**-23
_MAX_TICKS = 10


def firing_rate(trace: LayerTrace) -> NDArray[np.float64]:
    """Signed events per possible event of each channel: mean over tokens of ``|q - z| / qmax``.

    Args:
        trace: The layer.

    Returns:
        ``[C]``, in 0..1.
    """
    events = np.abs(trace.signed_spikes).sum(0)
    return np.asarray(events.mean(0) / trace.capacity)


def plot_rate_histogram(trace: LayerTrace, ax: Axes | None = None, bins: int = 25) -> Axes:
    """Draw how many channels of a layer fire at which rate, salient and ordinary apart.

    Args:
        trace: The layer, best with all channels recorded.
        ax: Axes to draw on.
        bins: Number of bins over the observed rates.

    Returns:
        The axes.
    """
    rate, salient = firing_rate(trace), trace.salient
    kinds: tuple[tuple[NDArray[np.bool_], str, str, Literal["stepfilled", "step"]], ...] = (
        (~salient, ORDINARY, "ordinary", "stepfilled"),
        (salient, SALIENT, "salient", "step"),
    )
    with rc_context(STYLE):
        ax = new_axes(4.2, 3) if ax is None else ax
        edges = np.linspace(0, max(float(rate.max()), 1e-3), bins + 1)
        for kind, colour, name, style in kinds:
            if kind.any():
                label = f"{name} ({kind.sum()}), mean {rate[kind].mean():.3f}"
                share = np.full(kind.sum(), 100 / kind.sum())
                ax.hist(
                    rate[kind], edges.tolist(), weights=share, color=colour, label=label,
                    histtype=style, lw=1.4, alpha=0.55 if style == "stepfilled" else 1,
                )  # fmt: skip
        ax.set_xlabel("rate (signed events per possible event)")
        ax.set_ylabel("channels of the kind (%)")
        ax.set_title(trace.name, loc="left")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.35)  # room for the legend
        ax.legend(frameon=False, loc="upper right")
    return ax


def rate_figure(traces: Sequence[LayerTrace]) -> Figure:
    """Draw the rate histograms of several layers in a grid.

    Args:
        traces: The layers.

    Returns:
        The figure.
    """
    columns = min(3, len(traces))
    rows = -(-len(traces) // columns)
    with rc_context(STYLE):
        figure = new_figure(3.6 * columns, 0.3 + 2.4 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for number, ax in enumerate(axes.flat):
            if number >= len(traces):
                ax.remove()
                continue
            plot_rate_histogram(traces[number], ax)
            ax.set_xlabel("")
            ax.set_ylabel("")
        figure.supxlabel("rate (signed events per possible event)", fontsize=9)
        figure.supylabel("channels of the kind (%)", fontsize=9)
    return figure


def plot_rate_heatmap(traces: Sequence[LayerTrace], ax: Axes | None = None) -> Axes:
    """Draw the rate of every channel, one row a layer; salient channels carry a mark.

    Args:
        traces: The layers; a layer with fewer channels leaves the end of its row grey.
        ax: Axes to draw on; a colour bar is added beside them.

    Returns:
        The axes.
    """
    longest = max(len(trace.channels) for trace in traces)
    image = np.full((len(traces), longest), np.nan)
    for row, trace in enumerate(traces):
        image[row, : len(trace.channels)] = firing_rate(trace)
    with rc_context(STYLE):
        ax = new_axes(9, 1.5 + 0.3 * len(traces)) if ax is None else ax
        ax.set_facecolor("0.9")
        norm = PowerNorm(0.5, 0, max(float(np.nanmax(image)), 1e-3))  # a few channels fire far more
        drawn = ax.imshow(image, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        for row, trace in enumerate(traces):
            ax.axhspan(row - 0.5, row - 0.28, color="white", lw=0)
            marked = np.nonzero(trace.salient)[0]
            ax.vlines(marked, row - 0.48, row - 0.3, color=SALIENT, lw=0.9)
        ax.set_yticks(range(len(traces)), _short_names(traces))
        ax.set_xlabel("recorded channel")
        bar = ax.get_figure().colorbar(drawn, ax=ax, pad=0.01)  # type: ignore[union-attr]
        bar.set_label("rate (events per\npossible event)")
        mark = Line2D([], [], ls="", marker="|", ms=8, mew=1.2, color=SALIENT)
        ax.legend(
            [mark], ["salient channel"], loc="lower right", bbox_to_anchor=(1, 1), frameon=False
        )
    return ax


def _short_names(traces: Sequence[LayerTrace]) -> list[str]:
    """Layer names without what they have in common at the front."""
    names = [trace.name.split(".") for trace in traces]
    shortest, common = min(map(len, names)) - 1 if len(names) > 1 else 0, 0
    while common < shortest and len({name[common] for name in names}) == 1:
        common += 1
    return [".".join(name[common:]) for name in names]


def plot_difference(
    layers: Sequence[str], difference: Sequence[float], ax: Axes | None = None
) -> Axes:
    """Draw how far the outputs of the views of each layer are apart.

    Args:
        layers: Layer names, R of them, in the order of execution.
        difference: Largest difference of the outputs, relative to the largest output, R.
        ax: Axes to draw on.

    Returns:
        The axes.
    """
    values = np.array(difference, dtype=np.float64)
    with rc_context(STYLE):
        ax = new_axes() if ax is None else ax
        ax.plot(range(len(values)), values, "o", ms=3.5, mew=0, color=ORDINARY, clip_on=False)
        ax.axhline(_FLOAT32_EPS, color=GREY, ls="--", lw=0.9)
        ax.annotate(
            "float32 rounding", (1, _FLOAT32_EPS), (0, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=8, color=GREY,
        )  # fmt: skip
        ax.set_yscale("symlog", linthresh=1e-8, linscale=0.5)
        ax.set_ylim(0, max(1e-6, float(values.max(initial=0)) * 3))
        _block_ticks(ax, layers)
        ax.set_ylabel("max |difference| of outputs\n(relative to max |output|)")
        exact = int((values == 0).sum())
        ax.set_title(f"outputs: {exact} of {len(values)} layers equal bit for bit", loc="left")
    return ax


def plot_integers(
    layers: Sequence[str], compared: Sequence[int], differing: Sequence[int], ax: Axes | None = None
) -> Axes:
    """Draw how many integers of each layer were compared between the views, and how many differ.

    Args:
        layers: Layer names, R of them, in the order of execution.
        compared: Integers compared, R.
        differing: Integers that differ, R.
        ax: Axes to draw on.

    Returns:
        The axes.
    """
    position = np.arange(len(layers))
    with rc_context(STYLE):
        ax = new_axes() if ax is None else ax
        ax.bar(position, compared, width=0.8, color="#56B4E9", label="compared")
        ax.bar(position, differing, width=0.8, color=SALIENT, label="differing")
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.8)
        _block_ticks(ax, layers)
        ax.set_ylabel("integers")
        ax.set_title(f"{sum(differing):,} of {sum(compared):,} integers differ", loc="left")
        ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))
    return ax


def equivalence_figure(
    layers: Sequence[str],
    compared: Sequence[int],
    differing: Sequence[int],
    difference: Sequence[float],
) -> Figure:
    """Draw `plot_integers` above `plot_difference`.

    Args:
        layers: Layer names, R of them, in the order of execution.
        compared: Integers compared, R.
        differing: Integers that differ, R.
        difference: Largest difference of the outputs, relative to the largest output, R.

    Returns:
        The figure.
    """
    with rc_context(STYLE):
        figure = new_figure(float(np.clip(1.5 + 0.06 * len(layers), 5.5, 14)), 5)
        upper, lower = figure.subplots(2, 1, sharex=True)
        plot_integers(layers, compared, differing, upper).set_xlabel("")
        plot_difference(layers, difference, lower)
    return figure


def _block_ticks(ax: Axes, layers: Sequence[str]) -> None:
    """Ticks where a block begins; the layers of a block stand side by side."""
    blocks = [name.split(".")[2] if name.startswith("model.layers.") else name for name in layers]
    firsts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    every = max(1, -(-len(firsts) // 16))
    ax.set_xticks(firsts[::every], [blocks[i] for i in firsts[::every]])
    ax.set_xlabel("block (its spiking layers side by side)")
    ax.set_xlim(-1, len(layers))


def plot_sweep(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    baseline: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a measure against a parameter, one line per series (at most 18 that can be told apart).

    Args:
        series: Points ``(parameter, measure)`` by name of the series.
        xlabel: Name of the parameter.
        ylabel: Name of the measure, with its unit.
        baseline: The measure of the dense model, a dashed line.
        ax: Axes to draw on.

    Returns:
        The axes.
    """
    markers = ("o", "s", "^", "D", "v", "P")
    with rc_context(STYLE):
        ax = new_axes(4.2, 3.2) if ax is None else ax
        for number, (name, points) in enumerate(series.items()):
            x, y = zip(*sorted(points), strict=True)
            style = {"color": SERIES[number % 6], "marker": markers[number % 6]}
            style |= {"ls": ("-", "--", ":")[number // 6 % 3]}
            style |= {"fillstyle": ("full", "none", "left")[number // 6 % 3]}
            ax.plot(x, y, lw=1.4, ms=5, label=name, **style)  # type: ignore[arg-type]
        ticks = sorted({x for points in series.values() for x, _ in points})
        if len(ticks) <= _MAX_TICKS:
            ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        if baseline is not None:
            ax.axhline(baseline, color=GREY, ls="--", lw=1, label=f"dense model ({baseline:.4g})")
        ax.grid(axis="y", color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.legend(frameon=False)
    return ax
