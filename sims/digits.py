r"""Train a small spiking network on handwritten digits, with one neuron after another.

Example::

    python -m sims.digits --steps 1 2 4 --levels 2 4 16 --seeds 5 --output digits

trains the same network (two hidden layers of spiking neurons) with GIF neurons of L levels, with
signed GIF neurons, with SpikeLM's elastic neuron, and with SpikingJelly's IFNode and ILIFNode, for
every number of time steps T, by surrogate gradients; the data are the 1797 images of scikit-learn's
digits (8 x 8 pixels; a quarter is held out). Prints a table and writes digits.csv and digits.png:
accuracy against spikes. To train your own network, start from :func:`spiking_network` and
:func:`train`.

A spike of k levels counts as k events, what it costs where one event is one addition. The pixels
enter the first layer as a constant current and are not counted.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from tqdm import tqdm

from neurons import ElasticBiSpikingNode, GIFNode, SignedGIFNode
from sims.charts import SERIES
from sims.common import check_folder, make_folder, run_script
from sims.plots import STYLE, new_figure, save_figure

__all__ = [
    "Digits",
    "Point",
    "digits_figure",
    "evaluate",
    "load_digits",
    "spiking_network",
    "sweep",
    "train",
]

BATCH, LEARNING_RATE = 64, 4e-3
ILIF_LEVELS = 5  # SpikingJelly's default: spikes 0 to 4


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 64]`` in 0..1 and their digits ``[N]``, to train on and held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Point:
    """What one kind of neuron reached at one number of steps, means over the seeds.

    Attributes:
        neuron: Name of the neuron.
        levels: L, spike levels of a step (of either sign).
        steps: T.
        accuracy: Share of the held-out images that are recognised.
        accuracy_std: Its standard deviation over the seeds.
        events: Events of all hidden neurons for one image.
        train_seconds: Time to train one network.
        inference_ms: Time for all held-out images at once, in milliseconds.
    """

    neuron: str
    levels: int
    steps: int
    accuracy: float
    accuracy_std: float
    events: float
    train_seconds: float
    inference_ms: float


def load_digits(seed: int = 0) -> Digits:
    """Load scikit-learn's digits, shuffled, a quarter held out.

    Args:
        seed: Of the shuffling.

    Returns:
        1348 images to train on, 449 held out.

    Raises:
        ImportError: scikit-learn is not installed; names the install command.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn; run `pip install 'snnllm[examples]'`."
        ) from error
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels, held = images[order], labels[order], len(labels) // 4
    return Digits(images[held:], labels[held:], images[:held], labels[:held])


def spiking_network(spiking: Callable[[], nn.Module], hidden: int) -> nn.Sequential:
    """Two hidden layers of spiking neurons and a linear readout, for inputs ``[T, N, 64]``.

    Args:
        spiking: Makes a multi-step node.
        hidden: Neurons of a hidden layer.

    Returns:
        The network; outputs ``[T, N, 10]``, whose mean over time are the logits.
    """

    def normalized(inputs: int) -> nn.Module:
        # SpikingJelly folds time into the batch around layers that know no time.
        inner = nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden)
        folded: nn.Module = layer.SeqToANNContainer(*inner)
        return folded

    return nn.Sequential(
        normalized(64), spiking(), normalized(hidden), spiking(), nn.Linear(hidden, 10)
    )


def logits_of(network: nn.Module, images: Tensor, steps: int) -> Tensor:
    """Run a network from its reset state: logits ``[N, 10]``, the mean over T steps."""
    functional.reset_net(network)
    logits: Tensor = network(images.expand(steps, *images.shape)).mean(0)
    return logits


def train(network: nn.Module, data: Digits, steps: int, epochs: int, seed: int) -> None:
    """Train with surrogate gradients: Adam, cosine schedule, cross entropy of the mean logits.

    Args:
        network: From :func:`spiking_network`.
        data: The digits.
        steps: T.
        epochs: Passes over the data.
        seed: Of the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for batch in order.split(BATCH):
                logits = logits_of(network, data.images[batch], steps)
                loss = nn.functional.cross_entropy(logits, data.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(network: nn.Module, data: Digits, steps: int) -> tuple[float, float, float]:
    """Accuracy on the held-out images, events for each, and milliseconds for all of them."""
    network.eval()
    events: list[float] = []

    def count(node: Any, _: Any, output: Tensor) -> None:
        # The elastic neuron emits its spikes times an amplitude, which is no event.
        unit = node.threshold if isinstance(node, ElasticBiSpikingNode) else 1.0
        events.append(float((output / unit).abs().sum()) / output.shape[1])

    hooks = [node.register_forward_hook(count) for node in (network[1], network[3])]  # type: ignore[index]
    logits = logits_of(network, data.test_images, steps)
    for hook in hooks:
        hook.remove()
    start = time.perf_counter()
    logits_of(network, data.test_images, steps)
    milliseconds = 1e3 * (time.perf_counter() - start)
    accuracy = float((logits.argmax(1) == data.test_labels).float().mean())
    return accuracy, sum(events), milliseconds


def contenders(levels: Sequence[int]) -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    """Spiking neurons by name, with their levels L."""
    kinds: dict[str, tuple[int, Callable[[], nn.Module]]] = {}
    for number in levels:
        kinds[f"GIF, L = {number}"] = number, partial(GIFNode, number, step_mode="m")
    kinds["signed GIF, L = 2"] = 2, lambda: SignedGIFNode(2, step_mode="m")
    kinds["elastic (SpikeLM)"] = 2, lambda: ElasticBiSpikingNode(step_mode="m")
    kinds["SpikingJelly IFNode"] = (
        2,
        lambda: neuron.IFNode(
            v_reset=None, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m"
        ),
    )
    spikes = surrogate.MultiLevelSpikeCount(ILIF_LEVELS - 1)
    kinds[f"SpikingJelly ILIFNode, L = {ILIF_LEVELS}"] = (
        ILIF_LEVELS,
        lambda: neuron.ILIFNode(surrogate_function=spikes, step_mode="m"),
    )
    return kinds


def sweep(
    steps: Sequence[int],
    levels: Sequence[int],
    seeds: int,
    epochs: int,
    hidden: int,
    report: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Train every kind of neuron at every number of steps.

    Args:
        steps: Values of T.
        levels: Values of L of the GIF neurons.
        seeds: Networks of each kind; a seed sets the weights and the order, not the split.
        epochs: Passes over the data.
        hidden: Neurons of a hidden layer.
        report: Called with every point when it is there.

    Returns:
        One point for each kind and T.

    Raises:
        ValueError: A number that is below 1.
        ImportError: scikit-learn is not installed.
    """
    for name, values in (("steps", steps), ("seeds, epochs and hidden", (seeds, epochs, hidden))):
        if min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(values)}.")
    data, points = load_digits(), []
    for name, (number, spiking) in contenders(levels).items():
        for time_steps in steps:
            runs = [_one(spiking, data, time_steps, epochs, hidden, seed) for seed in range(seeds)]
            accuracy, events, seconds, milliseconds = zip(*runs, strict=True)
            spread = statistics.stdev(accuracy) if seeds > 1 else 0.0
            means = [statistics.mean(values) for values in (events, seconds, milliseconds)]
            best = statistics.mean(accuracy)
            points.append(Point(name, number, time_steps, best, spread, *means))
            report(points[-1])
    return points


def _one(
    spiking: Callable[[], nn.Module],
    data: Digits,
    steps: int,
    epochs: int,
    hidden: int,
    seed: int,
) -> tuple[float, float, float, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the initial weights
        network = spiking_network(spiking, hidden)
    start = time.perf_counter()
    train(network, data, steps, epochs, seed)
    seconds = time.perf_counter() - start
    accuracy, events, milliseconds = evaluate(network, data, steps)
    return accuracy, events, seconds, milliseconds


def digits_figure(points: Sequence[Point]) -> Figure:
    """Accuracy against events of an image, a line for each neuron, T beside its points.

    Args:
        points: From :func:`sweep`.

    Returns:
        The figure.
    """
    with rc_context(STYLE):
        figure = new_figure(7.2, 3.8)
        ax = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(point.neuron for point in points)):
            own = [point for point in points if point.neuron == name]
            x, y = [p.events for p in own], [100 * p.accuracy for p in own]
            color = SERIES[number % len(SERIES)] if number < len(SERIES) else "#000000"
            marker = "s" if name.startswith("SpikingJelly") else "o"
            spread = [100 * p.accuracy_std for p in own]
            ax.errorbar(
                x, y, spread, color=color, marker=marker, ms=4, lw=1.2, elinewidth=0.7, label=name
            )
            for point, at, height in zip(own, x, y, strict=True):
                ax.annotate(
                    f"{point.steps}",
                    (at, height),
                    xytext=(3, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=color,
                )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="0.9", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("events of all hidden neurons for one image (numbers: time steps T)")
        ax.set_ylabel("accuracy on held-out digits, %")
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def write_csv(points: Sequence[Point], path: Path) -> Path:
    """Write one row a point and return the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [asdict(point) for point in points]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _row(point: Point) -> str:
    return (
        f"| {point.neuron} | {point.levels} | {point.steps} | {100 * point.accuracy:.1f} "
        f"+- {100 * point.accuracy_std:.1f} | {point.events:.0f} | {point.train_seconds:.1f} "
        f"| {point.inference_ms:.1f} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit code: 0, or 2 for input that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sims.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="T (%(default)s)")
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[2, 4, 16], help="L of the GIFs (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="networks of each (%(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="%(default)s")
    parser.add_argument("--hidden", type=int, default=32, help="neurons a layer (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("digits"), help="folder (%(default)s)")
    options = parser.parse_args(argv)

    def run() -> int:
        check_folder(options.output)
        print("| neuron | L | T | accuracy, % | events an image | training, s | inference, ms |")
        print("|---|---|---|---|---|---|---|")
        points = sweep(
            options.steps,
            options.levels,
            options.seeds,
            options.epochs,
            options.hidden,
            lambda point: tqdm.write(_row(point)),
        )
        folder = make_folder(options.output)
        print(f"wrote {write_csv(points, folder / 'digits.csv')}")
        print(f"wrote {save_figure(digits_figure(points), folder / 'digits.png')}")
        return 0

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
