from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sims.charts import (
    equivalence_figure,
    firing_rate,
    plot_difference,
    plot_integers,
    plot_rate_heatmap,
    plot_rate_histogram,
    plot_sweep,
    rate_figure,
)
from sims.plots import (
    ORDINARY,
    SALIENT,
    membrane_figure,
    plot_membrane,
    plot_raster,
    save_figure,
    token_label,
)
from sims.recording import record
from sims.traces import LayerTrace, Recording


@pytest.fixture(scope="module")
def recording(spiking_stories: Any, prompt_ids: torch.Tensor) -> Recording:
    return record(spiking_stories, prompt_ids, ["model.layers.0.mlp.*", "*.0.*.q_encoder"])


@pytest.fixture(scope="module")
def trace(recording: Recording) -> LayerTrace:
    return recording.select("model.layers.0.mlp.up_proj")


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5000


def test_membrane_draws_the_recorded_potentials(trace: LayerTrace) -> None:
    index = int(np.nonzero(trace.salient)[0][0])
    given = Figure().add_subplot()
    ax = plot_membrane(trace, index, ax=given)
    assert ax is given
    assert ax.get_ylabel() == "membrane (thresholds)"
    assert "salient, fires in 2 steps" in ax.get_title("left")
    drawn = {float(v) for v in np.asarray(ax.lines[0].get_ydata()) if not np.isnan(v)}
    for values in (trace.v_init, *trace.v_before_fire, *trace.v_after_reset):
        assert set(values[:, index].tolist()) <= drawn
    levels = [np.asarray(line.get_ydata()).tolist() for line in ax.lines]
    assert [1, 1] in levels  # the firing threshold
    assert [15, 15] in levels  # the most spikes of a step
    spikes = trace.spikes[:, :, index]
    assert sorted(int(t.get_text()) for t in ax.texts) == sorted(spikes[spikes > 0].tolist())
    assert ax.lines[0].get_color() == SALIENT


def test_membrane_of_a_missing_channel(trace: LayerTrace) -> None:
    with pytest.raises(ValueError, match="index 64"):
        plot_membrane(trace, 64)


def test_membrane_figure_has_a_panel_a_neuron(recording: Recording, tmp_path: Path) -> None:
    trace = recording.select("model.layers.0.mlp.up_proj")
    figure = membrane_figure(trace, recording.labels, max_panels=3)
    assert len(figure.axes) == 3
    assert is_picture(save_figure(figure, tmp_path / "a.png"))


@pytest.mark.parametrize("signed", [True, False])
def test_raster_shows_graded_spikes_with_salient_channels_on_top(
    trace: LayerTrace, signed: bool, tmp_path: Path
) -> None:
    ax = plot_raster(trace, signed=signed)
    image = ax.images[0].get_array()
    train = trace.signed_spikes if signed else trace.spikes
    order = np.argsort(~trace.salient, kind="stable")
    assert image is not None
    np.testing.assert_array_equal(image[:, 1::2], train[1].T[order])
    colours = [label.get_color() for label in ax.get_yticklabels()]
    assert colours[0] == SALIENT
    assert colours[-1] == ORDINARY
    assert is_picture(save_figure(ax.figure, tmp_path / "a.png"))


def test_raster_of_many_neurons_says_how_many_it_shows(trace: LayerTrace) -> None:
    ax = plot_raster(trace, max_neurons=10)
    assert "10 of 64 neurons" in ax.get_title("left")
    with pytest.raises(ValueError, match="max_neurons"):
        plot_raster(trace, max_neurons=0)


def test_raster_of_binary_neurons() -> None:
    ones = np.ones((1, 3, 2), np.uint8)
    parameters = np.ones((3, 1, 1))
    trace = LayerTrace(
        name="binary",
        levels=2,
        channels=np.arange(2),
        channel_group=np.zeros(2, np.uint8),
        channel_head=np.zeros(2, np.int64),
        steps=np.ones(2, np.int64),
        spikes=ones,
        v_after_reset=ones.astype(np.float32),
        charge=ones[0].astype(np.float32),
        threshold=parameters.astype(np.float32),
        zero_point=parameters.astype(np.int64),
    )
    for signed in (True, False):
        plot_raster(trace, signed=signed).get_figure().draw_without_rendering()


def test_firing_rate_is_events_over_possible_events(trace: LayerTrace) -> None:
    events = np.abs(trace.count - trace.per_channel(trace.zero_point)).mean(0)
    np.testing.assert_allclose(firing_rate(trace), events / (trace.steps * 15))


def test_rates(recording: Recording, tmp_path: Path) -> None:
    traces = list(recording.layers.values())
    ax = plot_rate_histogram(traces[-1])
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    figure = rate_figure(traces)
    assert len(figure.axes) == len(traces) == 4
    assert is_picture(save_figure(figure, tmp_path / "rates.png"))
    heat = plot_rate_heatmap(traces)
    names = [label.get_text() for label in heat.get_yticklabels()]
    assert names == ["self_attn.q_encoder", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert is_picture(save_figure(heat.figure, tmp_path / "heat.png"))


def test_equivalence(tmp_path: Path) -> None:
    layers = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a"]
    upper = plot_integers(layers, [10, 10, 20], [0, 3, 0])
    assert upper.get_title("left") == "3 of 40 integers differ"
    lower = plot_difference(layers, [0.0, 1e-7, 0.0])
    assert "2 of 3 layers equal" in lower.get_title("left")
    assert [label.get_text() for label in lower.get_xticklabels()] == ["0", "1"]
    figure = equivalence_figure(layers, [10, 10, 20], [0, 3, 0], [0.0, 1e-7, 0.0])
    assert is_picture(save_figure(figure, tmp_path / "a.png"))


def test_sweep_draws_every_series_and_the_baseline() -> None:
    ax = plot_sweep({"a": [(2, 5.0), (1, 9.0)], "b": [(1, 8.0)]}, "T", "perplexity", 4.0)
    assert np.asarray(ax.lines[0].get_xdata()).tolist() == [1, 2]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "dense model (4)"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" cat", "cat"),
        ("\n", "\\n"),
        ("  ", "\u2423"),
        ("", "\u2423"),
        ("$5", "\\$5"),
        ("internationalisation", "internation\u2026"),
    ],
)
def test_token_labels_are_visible(text: str, label: str) -> None:
    assert token_label(text) == label
