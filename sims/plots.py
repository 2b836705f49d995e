"""Figures of recorded neurons: membrane traces and rasters; style shared by all figures.

Every ``plot_*`` function draws on ``ax`` (a new figure if None) and returns the axes; the figure is
``ax.figure``. Colours are from the palette of Okabe and Ito, which colour-blind readers tell apart;
salient channels are vermilion everywhere, ordinary ones blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sims.traces import LayerTrace

__all__ = [
    "ORDINARY",
    "SALIENT",
    "STYLE",
    "membrane_figure",
    "new_axes",
    "new_figure",
    "plot_membrane",
    "plot_raster",
    "save_figure",
]

ORDINARY, SALIENT, SPIKE, GREY = "#0072B2", "#D55E00", "#000000", "#666666"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
}
_DPI = 200
_MAX_TOKEN_LABEL = 12


def new_axes(width: float = 6.4, height: float = 3.6) -> Axes:
    """Axes of a new figure that needs no display, in inches."""
    return new_figure(width, height).add_subplot()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG (or what the suffix says) and return the path."""
    figure.savefig(path, dpi=_DPI)
    return path


def token_label(text: str) -> str:
    """The text of a token as a tick label: visible, short, one line."""
    shown = text.strip("\r\n ") or {"\n": "\\n"}.get(text.strip(" "), "\u2423")
    shown = shown.replace("\n", "\\n").replace("$", "\\$")  # a lone dollar would start maths
    return shown if len(shown) <= _MAX_TOKEN_LABEL else shown[: _MAX_TOKEN_LABEL - 1] + "\u2026"


def _token_axis(ax: Axes, labels: Sequence[str], width: float, steps: int) -> None:
    """Label the middle of each token; thin the labels out until they fit."""
    every = max(1, -(-len(labels) // 40))
    ticks = list(range(0, len(labels), every))
    shown = [token_label(labels[n]) for n in ticks]
    room = 0.85 * ax.get_figure().get_figwidth() / len(shown)  # type: ignore[union-attr]
    ax.set_xticks([n * width + steps / 2 for n in ticks], shown)
    if room < 0.085 * max(map(len, shown)):  # inches of a character
        for label in ax.get_xticklabels():
            label.set(rotation=60, ha="right", rotation_mode="anchor")
    plural = "step" if steps == 1 else "steps"
    ax.set_xlabel(f"token ({steps} time {plural} each)")


# -- membrane --------------------------------------------------------------------------------------


def _membrane_path(trace: LayerTrace, index: int, width: float) -> tuple[Any, Any]:
    """Corners of the membrane over time; the pen lifts between tokens, whose neurons are fresh."""
    before = trace.v_before_fire[:, :, index].T
    after = trace.v_after_reset[:, :, index].T
    times, values = [], []
    for n, start in enumerate(trace.v_init[:, index]):
        base, v = n * width, start
        for t in range(before.shape[1]):
            times += [base + t, base + t + 0.3, base + t + 0.3, base + t + 0.6, base + t + 0.6]
            values += [v, v, before[n, t], before[n, t], after[n, t]]
            v = after[n, t]
        times += [base + before.shape[1], np.nan]
        values += [v, np.nan]
    return np.array(times), np.array(values)


def plot_membrane(
    trace: LayerTrace, index: int, labels: Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Draw the membrane of one neuron over the steps of consecutive tokens.

    In each step the membrane jumps by the charge, and falls by as many thresholds as the neuron
    fires spikes; the number of spikes stands at the fall. Before the first step it is z + 1/2.
    Above the upper line the neuron fires its most, L - 1, and the rest waits for the next step.

    Args:
        trace: The layer.
        index: Which of its recorded channels, ``0..C-1``.
        labels: Text of the recorded tokens.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: There is no such channel in the recording.
    """
    if not 0 <= index < len(trace.channels):
        raise ValueError(
            f"{trace.name}: index {index} is not one of {len(trace.channels)} channels."
        )
    with rc_context(STYLE):
        ax = new_axes() if ax is None else ax
        _draw_membrane(ax, trace, index, labels or [str(n) for n in range(len(trace.charge))])
    return ax


def _draw_membrane(ax: Axes, trace: LayerTrace, index: int, labels: Sequence[str]) -> None:
    salient, allowed = bool(trace.salient[index]), int(trace.steps[index])
    colour, steps = SALIENT if salient else ORDINARY, len(trace.spikes)
    width = steps + 0.7
    for n in range(0, len(labels), 2):
        ax.axvspan(n * width - 0.35, n * width + steps + 0.35, color="0.955", lw=0, zorder=0)
    times, values = _membrane_path(trace, index, width)
    ax.plot(times, values, color=colour, lw=1.3, solid_joinstyle="miter", zorder=3)
    starts = np.arange(len(labels)) * width
    ax.plot(starts, trace.v_init[:, index], "o", ms=3.5, mfc="white", mec=colour, mew=1, zorder=4)
    ax.axhline(1, color=SPIKE, lw=0.9, ls="--", zorder=2)
    ax.axhline(trace.levels - 1, color=GREY, lw=0.9, ls=":", zorder=2)
    top = max(float(values[~np.isnan(values)].max()), trace.levels - 1)
    _label_spikes(ax, trace, index, width)
    ax.set_xlim(-0.5, len(labels) * width - 0.2)
    ax.set_ylim(min(-0.5, float(np.nanmin(values)) - 0.5), top * 1.13)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    kind = "salient" if salient else "ordinary"
    plural = "step" if allowed == 1 else "steps"
    ax.set_title(
        f"channel {trace.channels[index]} ({kind}, fires in {allowed} {plural})",
        color=colour,
        loc="left",
    )
    ax.set_ylabel("membrane (thresholds)")
    _token_axis(ax, labels, width, steps)


def _label_spikes(ax: Axes, trace: LayerTrace, index: int, width: float) -> None:
    """Write the number of spikes beside each fall of the membrane."""
    before = trace.v_before_fire[:, :, index]
    for t, n in zip(*np.nonzero(trace.spikes[:, :, index]), strict=True):
        ax.annotate(
            str(trace.spikes[t, n, index]),
            (n * width + t + 0.6, before[t, n]),
            (1.5, 0),
            textcoords="offset points",
            ha="left",
            va="top" if trace.spikes[t, n, index] > trace.levels // 4 else "bottom",
            fontsize=7,
            zorder=5,
            in_layout=False,
        )


def membrane_figure(trace: LayerTrace, labels: Sequence[str] = (), max_panels: int = 12) -> Figure:
    """Draw the membranes of a layer's recorded neurons below each other.

    Args:
        trace: The layer.
        labels: Text of the recorded tokens.
        max_panels: Neurons to draw, the first of the recorded ones.

    Returns:
        The figure, with a legend.
    """
    panels = min(len(trace.channels), max_panels)
    steps, tokens = trace.spikes.shape[:2]
    with rc_context(STYLE):
        width = float(np.clip(1.5 + 0.28 * tokens * (steps + 0.7), 5.5, 15))
        figure = new_figure(width, 1.0 + 1.55 * panels)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        for index, ax in enumerate(axes):
            plot_membrane(trace, index, labels, ax)
            if index < panels - 1:
                ax.set_xlabel("")
                ax.tick_params(labelbottom=False)
            ax.set_ylabel("")
        figure.supylabel("membrane (thresholds)", fontsize=9)
        figure.suptitle(f"{trace.name} (numbers: spikes fired in a step)", fontsize=10)
        columns = 5 if width > 9 else 3
        figure.legend(handles=_membrane_legend(trace), loc="outside lower center", ncols=columns)
    return figure


def _membrane_legend(trace: LayerTrace) -> list[Line2D]:
    most = trace.levels - 1
    return [
        Line2D([], [], color=SPIKE, lw=0.9, ls="--", label="firing threshold (1)"),
        Line2D(
            [], [], color=GREY, lw=0.9, ls=":", label=f"most spikes of a step (L\u22121 = {most})"
        ),
        Line2D([], [], color=ORDINARY, lw=1.3, label="ordinary channel"),
        Line2D([], [], color=SALIENT, lw=1.3, label="salient channel"),
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            ms=4,
            mfc="white",
            mec="0.2",
            label="before step 0: z + \u00bd",
        ),
    ]


# -- raster ----------------------------------------------------------------------------------------


def plot_raster(
    trace: LayerTrace,
    labels: Sequence[str] = (),
    ax: Axes | None = None,
    signed: bool = True,
    max_neurons: int = 64,
) -> Axes:
    """Draw graded spikes over time, neurons as rows; salient channels on top, marked on the left.

    Args:
        trace: The layer.
        labels: Text of the recorded tokens.
        ax: Axes to draw on; a colour bar is added beside them.
        signed: Show the train re-encoded around zero (silent for small activations) or, if False,
            the spikes that the neuron fires, whose zero is z.
        max_neurons: Rows; of more neurons an even choice is drawn, and the title says so.

    Returns:
        The axes.
    """
    train = trace.signed_spikes if signed else trace.spikes.astype(np.int64)
    rows = _raster_rows(trace, max_neurons)
    steps, tokens, neurons = train.shape
    image = train.transpose(2, 1, 0).reshape(neurons, tokens * steps)[rows]
    with rc_context(STYLE):
        if ax is None:
            width = float(np.clip(2.5 + 0.16 * tokens * steps, 5.5, 15))
            ax = new_axes(width, float(np.clip(1.4 + 0.085 * len(rows), 3, 9)))
        _draw_raster(ax, image, trace.levels, signed)
        _mark_rows(ax, trace, rows)
        for n in range(1, tokens):
            ax.axvline(n * steps, color="0.8", lw=0.4)
        _token_axis(ax, labels or [str(n) for n in range(tokens)], steps, steps)
        shown = "" if len(rows) == neurons else f", {len(rows)} of {neurons} neurons"
        ax.set_title(f"{trace.name}{shown}", loc="left", pad=20)  # above the legend
    return ax


def _raster_rows(trace: LayerTrace, max_neurons: int) -> NDArray[np.int64]:
    if max_neurons < 1:
        raise ValueError(f"max_neurons must be at least 1, got {max_neurons}.")
    order = np.argsort(~trace.salient, kind="stable")  # salient ones first
    if len(order) <= max_neurons:
        return order
    picks = np.arange(max_neurons) * len(order) // max_neurons
    return np.asarray(order[picks])


def _draw_raster(ax: Axes, image: NDArray[np.int64], levels: int, signed: bool) -> None:
    most = levels - 1
    colours: str | Colormap = "RdBu_r" if signed else "Greys"
    norm: Normalize = Normalize(-most, most) if signed else Normalize(0, most)
    if levels == 2:
        colours = ListedColormap(["#2166AC", "white", "#B2182B"] if signed else ["white", "black"])
        norm = BoundaryNorm([-1.5, -0.5, 0.5, 1.5] if signed else [-0.5, 0.5, 1.5], colours.N)
    extent = (0, image.shape[1], image.shape[0], 0)
    drawn = ax.imshow(
        image, aspect="auto", interpolation="nearest", cmap=colours, norm=norm, extent=extent
    )
    name = "signed spikes in a step, sign(q \u2212 z)" if signed else "spikes in a step"
    bar = ax.get_figure().colorbar(drawn, ax=ax, pad=0.02)  # type: ignore[union-attr]
    bar.set_label(name)
    bar.locator = MaxNLocator(6, integer=True)
    bar.update_ticks()


def _mark_rows(ax: Axes, trace: LayerTrace, rows: NDArray[np.int64]) -> None:
    """Colour the channel numbers by kind and draw a strip beside the salient rows."""
    every = max(1, -(-len(rows) // 32))
    ticks = np.arange(0, len(rows), every)
    ax.set_yticks(ticks + 0.5, [str(trace.channels[rows[i]]) for i in ticks])
    for tick, i in zip(ax.get_yticklabels(), ticks, strict=True):
        tick.set_color(SALIENT if trace.salient[rows[i]] else ORDINARY)
        tick.set_fontsize(6.5)
    few = int(trace.salient[rows].sum())
    if 0 < few < len(rows):
        ax.axhline(few, color=SALIENT, lw=1)
    ax.set_ylabel("channel")
    handles = [Patch(color=SALIENT, label="salient"), Patch(color=ORDINARY, label="ordinary")]
    handles = handles if few else handles[1:]
    ax.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False,
        handlelength=0.8, borderaxespad=0.1,
    )  # fmt: skip
