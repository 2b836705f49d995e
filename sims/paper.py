"""Figures and audits of the paper's tables; `snnllm reproduce` measures and draws with them.

Functions that take a `Subject` are measures (`snnllm.paper.measures`): they look at a loaded model and
return JSON types. Functions that take rows with their records draw what was measured before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor, nn

from sims.charts import SERIES, equivalence_figure, plot_sweep
from sims.common import make_folder
from sims.equivalence import audit
from sims.plots import SALIENT, STYLE, membrane_figure, new_figure, plot_raster, save_figure
from sims.recording import Recorder
from snnllm.energy import ENERGY_MODELS, EnergyModel, MatmulWork, Network, matmul_energy
from snnllm.paper.lines import find
from snnllm.paper.measures import Measures, Subject
from snnllm.paper.recipes import Conversion, Measure, Record, Row, Table
from snnllm.saliency import InputStatistics
from snnllm.sources import dense_model

__all__ = ["CAPTIONS", "figures", "measures"]

_MAPPED = ("self_attn.q_proj", "mlp.down_proj")
_RECORDED = ("self_attn.q_proj", "mlp.down_proj")
_GROUP, _MEMBRANES = 16, 4
_TOKENS = 12
CAPTIONS: Mapping[str, str] = {
    "pareto": "Perplexity against mean time steps of a channel (linear inputs), logarithmic",
    "pareto_saliency": "The same for the variants of the saliency table",
    "spike_rate": "Spike rate of every layer: signed events per possible event",
    "sqnr": "Signal to quantisation noise of every block, on calibration text",
    "energy": "Energy of a token by operand and execution; counted operations times published costs",
}
"""What the figures of the records show."""


# -- measures --------------------------------------------------------------------------------------


def measures() -> Measures:
    """The measures of this module."""
    return {
        Measure.EQUIVALENCE: equivalence,
        Measure.SALIENCY_MAP: saliency_maps,
        Measure.RASTER: rasters,
    }


def equivalence(subject: Subject) -> dict[str, Any]:
    """Audit the views on the prompt; see `sims.equivalence`."""
    result = audit(subject.model, subject.data.prompt.to(subject.model.device))
    layers = result.layers
    figure = equivalence_figure(
        [layer.layer for layer in layers],
        [2 * layer.compared for layer in layers],
        [layer.differing for layer in layers],
        [layer.relative_difference for layer in layers],
    )
    path = save_figure(figure, make_folder(subject.figures) / f"equivalence_{_slug(subject)}.png")
    return {
        "layers": len(layers),
        "tokens": subject.data.prompt.numel(),
        "compared": result.compared,
        "differing": result.differing,
        "outputs": max(layer.relative_difference for layer in layers),
        "logits": result.logits_difference / result.logits_magnitude,
        "agrees": result.agrees,
        "figures": {path.name: f"Agreement of the views, layer by layer: {subject.title}"},
    }


def saliency_maps(subject: Subject) -> dict[str, Any]:
    """Scores of all blocks in the dense model, with the salient channels of the converted one."""
    model, conversion = subject.model, subject.conversion
    assert isinstance(conversion, Conversion)  # float models have no salient channels
    drawn = {}
    for path in _MAPPED:
        groups = [
            block.get_submodule(path).encoder.channel_group.cpu() > 0
            for block in model.model.layers
        ]
        scores = _dense_scores(subject, path, conversion.spike.score)
        figure = saliency_figure(scores, torch.stack(groups).numpy(), path)
        name = f"saliency_{path.rpartition('.')[2]}.png"
        save_figure(figure, make_folder(subject.figures) / name)
        drawn[name] = (
            f"{conversion.spike.score} score of every input channel of {path} in the float model "
            f"(rank within the block, one calibration window), and the channels that are salient: "
            f"{subject.title}"
        )
    return {"figures": drawn}


def _dense_scores(subject: Subject, path: str, score: Any) -> NDArray[np.float64]:
    """Scores `[blocks, C]` of the inputs of one linear of every block, on one calibration window."""
    model = dense_model(subject.source).to(subject.model.device)
    generator = torch.Generator().manual_seed(0)
    scores: list[Tensor] = []

    def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight = module.get_parameter("weight").detach()
        statistics = InputStatistics([weight], score)
        statistics.update(args[0].detach())
        scores.append(statistics.scores([weight], generator)[0].cpu())

    hooks = [b.get_submodule(path).register_forward_pre_hook(observe) for b in model.model.layers]
    with torch.no_grad():
        model(input_ids=subject.data.calibration[:1].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(scores).double().numpy()


def rasters(subject: Subject) -> dict[str, Any]:
    """Spikes and membranes of a group of neurons in the middle of the model, on the prompt."""
    middle = len(subject.model.model.layers) // 2
    names = [f"model.layers.{middle}.{path}" for path in _RECORDED]
    ids = subject.data.prompt[:_TOKENS]
    text = [subject.tokenizer.decode([i]) for i in ids.tolist()]
    folder, drawn = make_folder(subject.figures), {}
    recording = Recorder(subject.model, names, channels=f"auto:{_GROUP}").run(ids, text)
    for name, trace in recording.layers.items():
        path = folder / f"raster_{name.rpartition('.')[2]}.png"
        save_figure(plot_raster(trace, recording.labels).figure, path)
        drawn[path.name] = f"Signed spikes of a group of neurons: {name}, {subject.title}"
    recording = Recorder(subject.model, names, channels=f"auto:{_MEMBRANES}").run(ids, text)
    for name, trace in recording.layers.items():
        path = folder / f"membrane_{name.rpartition('.')[2]}.png"
        save_figure(membrane_figure(trace, recording.labels), path)
        drawn[path.name] = f"Membranes of a few of them: {name}, {subject.title}"
    return {"figures": drawn}


def _slug(subject: Subject) -> str:
    return "float" if subject.conversion is None else subject.conversion.name


def saliency_figure(scores: NDArray[np.float64], salient: NDArray[np.bool_], path: str) -> Figure:
    """Draw the rank of every channel's score in its block, and mark the salient channels.

    Args:
        scores: `[blocks, C]`.
        salient: Salient channels, `[blocks, C]`.
        path: Name of the linear, for the title.

    Returns:
        The figure: ranks above, salient channels below.
    """
    rank = scores.argsort(1).argsort(1) / max(1, scores.shape[1] - 1)
    with rc_context(STYLE):
        figure = new_figure(9, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        drawn = upper.imshow(
            rank, aspect="auto", interpolation="nearest", cmap="viridis", norm=Normalize(0, 1)
        )
        figure.colorbar(drawn, ax=upper, pad=0.01).set_label("rank of the score")
        upper.set_title(f"{path}: score", loc="left")
        row, column = np.nonzero(salient)
        lower.vlines(column, row - 0.45, row + 0.45, color=SALIENT, lw=0.8)
        lower.set_ylim(len(salient) - 0.5, -0.5)
        lower.set_title(f"salient channels ({100 * salient.mean():.1f} %)", loc="left")
        lower.set_xlabel("input channel")
        for ax in (upper, lower):
            ax.set_ylabel("block")
    return figure


# -- figures of the records ------------------------------------------------------------------------

Rows = Sequence[tuple[Row, Record]]


def figures(
    tables: Sequence[Table], record: Callable[[Row], Record], folder: Path
) -> list[tuple[str, Path]]:
    """Draw everything that the records of the tables allow.

    Args:
        tables: The tables of the run.
        record: Gives what is known about the model of a row.
        folder: Where to write; measures have left their own figures there.

    Returns:
        Captions and files, those of the measures included.
    """
    by_name = {table.name: [(row, record(row)) for row in table.rows] for table in tables}
    rows = list({row.name: (row, r) for rows in by_name.values() for row, r in rows}.values())
    made: dict[str, Figure | None] = {
        "pareto": pareto_figure(by_name.get("main", ()), "perplexity"),
        "pareto_saliency": pareto_figure(by_name.get("saliency", ()), "sample"),
        "spike_rate": rate_figure(by_name.get("efficiency", ())),
        "sqnr": sqnr_figure(by_name.get("main", ()) or by_name.get("efficiency", ())),
        "energy": energy_figure(by_name.get("efficiency", ())),
    }
    found = [
        (CAPTIONS[name], save_figure(figure, make_folder(folder) / f"{name}.png"))
        for name, figure in made.items()
        if figure is not None
    ]
    for _, known in rows:
        for measured in known["measures"].values():
            drawn = measured.get("figures", {}) if isinstance(measured, Mapping) else {}
            found += [(text, folder / n) for n, text in drawn.items() if (folder / n).is_file()]
    return found


def pareto_figure(rows: Rows, measure: str) -> Figure | None:
    """Draw perplexity against mean steps, one series per method; None without a spiking row."""
    series: dict[str, list[tuple[float, float]]] = {}
    baseline = None
    for row, record in rows:
        results = find(record, "measures", measure)
        if not results:
            continue
        perplexity = next(iter(results.values()))["perplexity"]
        steps = find(record, "model", "mean_steps")
        if row.conversion is None:
            baseline = perplexity
        elif steps is not None and np.isfinite(perplexity):
            name = row.label.partition(",")[0] + ("" if row.bits == "W4A4" else f" {row.bits}")
            if measure == "sample" and isinstance(row.conversion, Conversion):
                name = f"{row.conversion.spike.value_range}, {row.label.partition(',')[0]}"
            series.setdefault(name, []).append((steps, perplexity))
    if not series:
        return None
    with rc_context(STYLE):
        figure = new_figure(6.4, 3.8)
        ax = figure.subplots()
        label = "mean time steps of a channel"
        plot_sweep(series, label, "token perplexity", baseline, ax)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(MaxNLocator(7))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def sqnr_figure(rows: Rows) -> Figure | None:
    """Draw the signal to noise ratio of every block, one line per converted row."""
    series = {}
    for row, record in rows:
        blocks = find(record, "conversion", "blocks")
        if blocks:
            series[row.title] = [(float(b["index"]), float(b["sqnr_db"])) for b in blocks]
    if not series:
        return None
    with rc_context(STYLE):
        figure = new_figure(7.2, 4.2)
        ax = figure.subplots()
        plot_sweep(series, "block", "SQNR of the block output (dB)", None, ax)
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _counted(rows: Rows) -> list[tuple[Row, Mapping[str, Any]]]:
    known = [(row, find(record, "measures", "operations")) for row, record in rows]
    return [(row, counted) for row, counted in known if counted]


def rate_figure(rows: Rows) -> Figure | None:
    """Draw the spike rate of every layer over the blocks, a panel per row and a line per operand."""
    counted = _counted(rows)
    if not counted:
        return None
    columns = min(3, len(counted))
    with rc_context(STYLE):
        figure = new_figure(3.1 * columns + 1.2, 0.4 + 2.6 * -(-len(counted) // columns))
        axes = list(figure.subplots(-(-len(counted) // columns), columns, squeeze=False).flat)
        for ax, (row, values) in zip(axes, counted, strict=False):
            plot_sweep(_rates(values["rows"]), "block", "spike rate (%)", None, ax)
            ax.set_title(row.title, loc="left")
            ax.get_legend().remove()
        for ax in axes[len(counted) :]:
            ax.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Rate in per cent of every operand by block; the operand of `qk` is K, that of `pv` is V."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        block, role = row["name"].split(".")[2], row["name"].rpartition(".")[2]
        if row["spikes"] is not None:
            name = {"qk": "K", "pv": "V"}.get(role, role)
            series.setdefault(name, []).append((float(block), 100 * row["spikes"]["rate"]))
    return series


def energy_figure(rows: Rows) -> Figure | None:
    """Draw the energy of a token by operand, stacked, for each row and its dense rivals."""
    counted = _counted(rows)
    if not counted:
        return None
    shown = (Network.DENSE_FP16, Network.DENSE_INT8, Network.COLLAPSED, Network.SPIKING)
    with rc_context(STYLE):
        height = 1.6 + 0.22 * (2 + 2 * len(counted))
        figure = new_figure(9.6, height)
        axes = figure.subplots(1, len(ENERGY_MODELS), sharey=True, squeeze=False)[0]
        for ax, model in zip(axes, ENERGY_MODELS, strict=True):
            bars = [
                (str(n) if dense else f"{row.title}: {n}", _parts(values, model, n))
                for row, values in counted
                for n in shown
                if (dense := n in shown[:2]) <= (row is counted[0][0])
            ]
            _stack(ax, bars)
            ax.set_title(model.provenance.name, loc="left")
            ax.set_xlabel("energy of a token (uJ)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _parts(counted: Mapping[str, Any], model: EnergyModel, network: Network) -> dict[str, float]:
    """Energy of a token by part, uJ: attention products, linears by place, what stays float."""
    places = {"self_attn": "attention linears", "mlp": "MLP linears"}
    fields = [field.name for field in dataclasses.fields(MatmulWork)]
    parts = dict.fromkeys((*places.values(), "Q K and P V", "float rest"), 0.0)
    for row in counted["rows"]:
        place = places[row["name"].split(".")[3]] if row["kind"] == "linear" else "Q K and P V"
        work = MatmulWork(**{field: row[field] for field in fields})
        parts[place] += matmul_energy(model, network, work)
    name = model.provenance.name
    (rest,) = (
        row["rest_pj"]
        for row in counted["energy"]["rows"]
        if (row["model"], row["network"]) == (name, network)
    )
    parts["float rest"] = rest
    return {name: value * 1e-6 / counted["tokens"] for name, value in parts.items()}


def _stack(ax: Axes, bars: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Horizontal stacked bars, the first at the top."""
    left = np.zeros(len(bars))
    for number, part in enumerate(bars[0][1]):
        values = np.array([parts[part] for _, parts in bars])
        ax.barh(range(len(bars)), values, left=left, color=SERIES[number], label=part)
        left += values
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.invert_yaxis()
