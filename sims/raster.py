r"""Record spikes while a prompt runs; draw rasters, rate histograms and a heat map of the rates.

Example::

    python -m sims.raster smollm2 --layers "model.layers.3.*" \
        --prompt "The capital of France is" --output raster

writes raster.npz (all recorded arrays), raster.csv (one row per layer, token, channel and step),
rates.csv (one row per layer and channel), raster_LAYER.png per layer, rates.png and heatmap.png.
Rates count the signed train, |q - z| events of qmax possible ones, which is silent around zero; the
unsigned neuron fires about z spikes for a zero (--coding unsigned draws those).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from tqdm import tqdm

from sims.charts import firing_rate, plot_rate_heatmap, rate_figure
from sims.common import (
    Subject,
    add_conversion_arguments,
    add_model_argument,
    add_recording_arguments,
    check_folder,
    load_subject,
    make_folder,
    read_conversion,
    record_prompt,
    run_script,
    save_recording,
)
from sims.plots import plot_raster, save_figure
from sims.traces import Recording


class Coding(StrEnum):
    """Which train the raster shows."""

    SIGNED = "signed"
    UNSIGNED = "unsigned"


def simulate(
    subject: Subject,
    prompt: str,
    layers: Sequence[str],
    tokens: str,
    channels: str,
    memory_limit: int,
    output: Path,
    coding: Coding = Coding.SIGNED,
    csv_rows: int = 1_000_000,
    max_neurons: int = 64,
) -> list[Path]:
    """Record and draw spikes of a loaded model; other arguments as in ``--help``.

    Returns:
        The files that were written.

    Raises:
        ValueError: A layer, token, channel or prompt that does not exist or fit.
        OSError: The output cannot be written.
    """
    recording = record_prompt(subject, prompt, layers, tokens, channels, memory_limit)
    folder = make_folder(output)
    files = save_recording(recording, folder, "raster", csv_rows)
    files.append(write_rates(recording, folder / "rates.csv"))
    for name, trace in tqdm(recording.layers.items(), desc="drawing", unit="layer"):
        ax = plot_raster(
            trace, recording.labels, signed=coding is Coding.SIGNED, max_neurons=max_neurons
        )
        files.append(save_figure(ax.figure, folder / f"raster_{name}.png"))
    traces = list(recording.layers.values())
    files.append(save_figure(rate_figure(traces), folder / "rates.png"))
    files.append(save_figure(plot_rate_heatmap(traces).figure, folder / "heatmap.png"))
    return files


def write_rates(recording: Recording, path: Path) -> Path:
    """Write mean counts and rates, one row per layer and channel; returns the path.

    ``spikes_per_token`` is the mean count q of the unsigned neuron, ``events_per_token`` the mean
    ``|q - z|`` of the signed train, ``rate`` the latter over the capacity ``T * (L-1)``.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("layer", "channel", "salient", "steps", "spikes_per_token", "events_per_token", "rate")
        )
        for trace in recording.layers.values():
            rate, mean = firing_rate(trace), trace.count.mean(0)
            columns = (trace.channels, trace.salient.astype(int), trace.steps)
            for channel, salient, steps, spikes, part, most in zip(
                *columns, mean, rate, trace.capacity, strict=True
            ):
                numbers = (f"{spikes:.6g}", f"{part * most:.6g}", f"{part:.6g}")
                writer.writerow((trace.name, channel, salient, steps, *numbers))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit code: 0, or 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sims.raster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    add_recording_arguments(parser, "model.layers.0.*", "all")
    parser.add_argument(
        "--coding",
        type=Coding,
        choices=list(Coding),
        default=Coding.SIGNED,
        help="train that the raster shows (%(default)s)",
    )
    parser.add_argument("--neurons", type=int, default=64, help="rows of a raster (%(default)s)")
    add_conversion_arguments(parser)
    options = parser.parse_args(argv)

    def run() -> int:
        check_folder(options.output)  # before the model is loaded, which takes longer
        files = simulate(
            load_subject(options.model, read_conversion(options)),
            options.prompt,
            options.layers,
            options.tokens,
            options.channels,
            int(options.memory_limit * 2**20),
            options.output,
            options.coding,
            options.csv_rows,
            options.neurons,
        )
        print("\n".join(f"wrote {path}" for path in files))
        return 0

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
