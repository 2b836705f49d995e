"""How close to the speed of memory are GIF neurons, and how do they compare with SpikingJelly's?

On a GPU, in one process: the share of the measured copy bandwidth that the forward pass reaches
(every input byte read once, every output byte written once), times and peak memory beside
SpikingJelly's multi-step IFNode and ILIFNode on the backend that it chooses itself, and small sizes,
where launching is what takes time. Contenders are interleaved, medians are compared, and next to
the times it says whether the integers are those of the torch reference. Without a GPU (or with
--quick) the sizes are tiny and the times mean nothing: a test that everything runs.

Both kinds of nodes read x and write the spikes and the last membrane. Theirs read a membrane of
zeros that was written before and always write the charged membrane of every step (float32); ours
start from a number, and write one bit of a neuron and step, and only for a backward pass. "No state"
is ours with ``keep_state=False``, which writes no last membrane either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from neurons import Dynamics, GIFNode, multi_step

Call = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = ((4, 1024), (4, 16384), (4, 262144))  # T, neurons
ELEMENTS, QUICK_ELEMENTS = 2**26, 2**11
SLEEP = 10_000_000  # cycles, some 6 ms: launches are queued before the first kernel starts


@dataclass(frozen=True)
class Run:
    """How to measure: device, rounds, and the backend of our nodes."""

    device: str
    rounds: int
    backend: str
    seed: int

    @property
    def cuda(self) -> bool:
        """Whether times mean something."""
        return self.device == "cuda"

    def charges(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random charges, mostly within a few thresholds; never zeros."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return x.mul_(2).to(dtype)

    def medians(self, contenders: dict[str, Call]) -> dict[str, float]:
        """Median device time of each contender in microseconds, interleaved."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for call in contenders.values():
            for _ in range(3):
                call()
        for _ in range(self.rounds):
            for name, call in contenders.items():
                times[name].append(self._time(call))
        return {name: statistics.median(values) for name, values in times.items()}

    def _time(self, call: Call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * begin.elapsed_time(end)

    def launches(self, contenders: dict[str, Call], calls: int) -> dict[str, float]:
        """Median wall time of a call in microseconds when many follow each other."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.rounds + 1):
            for name, call in contenders.items():
                self._synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                self._synchronize()
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
        return {name: statistics.median(values[1:]) for name, values in times.items()}

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, call: Call) -> int:
        """Bytes that a call allocates at its peak, above what was there before; 0 on a CPU."""
        if not self.cuda:
            return 0
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def copy_bandwidth(run: Run, elements: int) -> float:
    """Measured bandwidth of a copy in bytes a second, read and write counted."""
    source = run.charges(elements)
    target = torch.empty_like(source)
    microseconds = run.medians({"copy": lambda: target.copy_(source)})["copy"]
    return 2e6 * source.numel() * source.element_size() / microseconds


# ---- forward, share of the copy bandwidth

OUTPUTS: dict[str, dict[str, Any]] = {
    "spikes, membrane": {},
    "spikes": {"store_v": False},
    "int8 spikes, membrane": {"dtype": torch.int8},
    "int8 spikes": {"dtype": torch.int8, "store_v": False},
    "int8 counts": {"dtype": torch.int8, "output": "count", "store_v": False},
    "int8 spikes, all membranes": {"dtype": torch.int8, "store_v_seq": True, "store_v": False},
}


def forward_shares(run: Run, elements: int, steps: Sequence[int], bandwidth: float) -> list[dict]:
    """Time the forward pass in all its outputs, T x dtype."""
    results = []
    spec = Dynamics(levels=8)  # at T = 16 the counts fit in int8
    for time_steps in steps:
        for name in ("float32", "bfloat16"):
            x_seq = run.charges(time_steps, elements // time_steps, dtype=DTYPES[name])
            calls = {
                output: lambda options=options, x_seq=x_seq: multi_step(
                    x_seq, spec, 0.5, backend=run.backend, **options
                )
                for output, options in OUTPUTS.items()
            }
            with torch.no_grad():
                times = run.medians(calls)
            for output, microseconds in times.items():
                size = _bytes(x_seq, calls[output]())
                results.append(
                    {
                        "T": time_steps,
                        "input": name,
                        "written": output,
                        "us": microseconds,
                        "bytes": size,
                        "share": 1e6 * size / microseconds / bandwidth,
                        "exact": is_exact(run, x_seq, spec, OUTPUTS[output]),
                    }
                )
    return results


def _bytes(x_seq: Tensor, train: Any) -> int:
    tensors = [x_seq, *(t for t in train if t is not None)]
    return sum(t.numel() * t.element_size() for t in tensors)


def is_exact(run: Run, x_seq: Tensor, spec: Dynamics, options: dict[str, Any]) -> bool:
    """Whether both ends of the neurons, where offsets go wrong, are those of the torch reference."""
    whole = multi_step(x_seq, spec, 0.5, backend=run.backend, **options)
    width, most = min(2**20, x_seq.shape[1]), x_seq.shape[1]
    for part in (slice(0, width), slice(most - width, most)):
        expected = multi_step(x_seq[:, part], spec, 0.5, backend="torch", **options)
        pairs = [
            (a, b) for a, b in zip(whole, expected, strict=True) if b is not None and b.numel()
        ]
        if not all(torch.equal(ours[..., part], theirs) for ours, theirs in pairs):
            return False
    return True


# ---- beside SpikingJelly


def nodes(backend: str) -> dict[str, tuple[Any, Any]]:
    """Pairs of nodes with the same task: theirs, ours."""
    levels = 16
    return {
        "IFNode, binary": (
            neuron.IFNode(v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m"),
            GIFNode(2, v_init=0.0, step_mode="m", backend=backend),
        ),
        "ILIFNode, 16 levels, leak": (
            neuron.ILIFNode(4 / 3, 1.0, surrogate.MultiLevelSpikeCount(levels - 1), step_mode="m"),
            GIFNode(levels, step_mode="m", decay=0.25, backend=backend),
        ),
    }


def _forward(node: Any, x_seq: Tensor, spike_dtype: torch.dtype | None = None) -> Call:
    @torch.no_grad()
    def call() -> Tensor:
        node.reset()
        node.spike_dtype = spike_dtype
        return node(x_seq)

    return call


def _train(node: Any, x_seq: Tensor, grad: Tensor) -> Call:
    x_seq = x_seq.detach().requires_grad_()

    def call() -> Tensor:
        node.reset()
        node.spike_dtype = None
        x_seq.grad = None
        node(x_seq).backward(grad)
        node.reset()
        return x_seq.grad

    return call


def beside_spikingjelly(run: Run, elements: int, steps: Sequence[int]) -> list[dict]:
    """Times and peak memory of both, forward and forward + backward."""
    results = []
    for time_steps in steps:
        for name in ("float32", "bfloat16"):
            x_seq = run.charges(time_steps, elements // time_steps, dtype=DTYPES[name])
            grad = torch.randn_like(x_seq)
            for pair, (theirs, ours) in nodes(run.backend).items():
                bare = GIFNode(
                    ours.levels,
                    v_init=ours.v_init,
                    step_mode="m",
                    decay=ours.decay,
                    backend=run.backend,
                    keep_state=False,
                )
                forward = {
                    "theirs": _forward(theirs, x_seq),
                    "ours": _forward(ours, x_seq),
                    "bare": _forward(bare, x_seq),
                    "int8": _forward(bare, x_seq, torch.int8),
                }
                train = {
                    "theirs": _train(theirs, x_seq, grad),
                    "ours": _train(ours, x_seq, grad),
                    "bare": _train(bare, x_seq, grad),
                }
                row = {"T": time_steps, "input": name, "pair": pair}
                row["same spikes"] = torch.equal(forward["theirs"](), forward["ours"]())
                row |= {f"forward {k}": v for k, v in run.medians(forward).items()}
                row |= {f"train {k}": v for k, v in run.medians(train).items()}
                row |= {f"peak {k}": run.peak(call) for k, call in train.items()}
                results.append(row)
                theirs.reset()
                ours.reset()
    return results


def small_sizes(run: Run, sizes: Sequence[tuple[int, int]], calls: int) -> list[dict]:
    """Wall time of a call where launching is what takes time, float32."""
    results = []
    for time_steps, neurons in sizes:
        x_seq = run.charges(time_steps, neurons)
        grad = torch.randn_like(x_seq)
        for pair, (theirs, ours) in nodes(run.backend).items():
            row: dict[str, Any] = {"T": time_steps, "neurons": neurons, "pair": pair}
            forward = {"theirs": _forward(theirs, x_seq), "ours": _forward(ours, x_seq)}
            train = {"theirs": _train(theirs, x_seq, grad), "ours": _train(ours, x_seq, grad)}
            row |= {f"forward {k}": v for k, v in run.launches(forward, calls).items()}
            row |= {f"train {k}": v for k, v in run.launches(train, calls).items()}
            results.append(row)
    return results


# ---- output


def implementations(device: str) -> str:
    """What SpikingJelly runs on this device."""
    chosen = (
        functional.neuron_implementation(name, torch.device(device), execution="eager")
        for name in ("if", "ilif")
    )
    return ", ".join(str(c["implementation"]) for c in chosen)


def print_results(results: dict[str, list[dict]]) -> None:
    """Print the three tables."""
    table(
        "Forward: share of the measured copy bandwidth",
        ("T", "input", "written", "us", "GB", "share of copy", "integers equal"),
        [
            (
                *(r["T"], r["input"], r["written"], f"{r['us']:.1f}", f"{r['bytes'] / 1e9:.3f}"),
                *(f"{r['share']:.1%}", "yes" if r["exact"] else "NO"),
            )
            for r in results["forward"]
        ],
    )
    table(
        "Beside SpikingJelly: theirs / ours (ratio); peak memory of forward + backward, MiB",
        (
            *("T", "input", "pair", "forward, us", "no state", "no state, int8 spikes"),
            *("forward + backward, us", "no state", "peak MiB", "same spikes"),
        ),
        [
            (
                *(r["T"], r["input"], r["pair"], _ratio(r, "forward")),
                *(_ratio(r, "forward", "bare"), _ratio(r, "forward", "int8")),
                *(_ratio(r, "train"), _ratio(r, "train", "bare")),
                f"{r['peak theirs'] / 2**20:.0f} / {r['peak ours'] / 2**20:.0f}",
                "yes" if r["same spikes"] else "no (other rounding)",
            )
            for r in results["peers"]
        ],
    )
    table(
        "Small sizes, float32: wall time of a call, theirs / ours (ratio)",
        ("T", "neurons", "pair", "forward, us", "forward + backward, us"),
        [
            (r["T"], r["neurons"], r["pair"], _ratio(r, "forward"), _ratio(r, "train"))
            for r in results["small"]
        ],
    )


def _ratio(row: dict[str, Any], what: str, ours: str = "ours") -> str:
    theirs, own = row[f"{what} theirs"], row[f"{what} {ours}"]
    return f"{theirs:.1f} / {own:.1f} ({theirs / own:.2f}x)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if an integer differs from the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--elements", type=int, help="elements of the input, all steps together")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 16], help="T")
    parser.add_argument("--rounds", type=int, help="median of so many")
    parser.add_argument("--backend", default="auto", help="of our nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = args.quick or device == "cpu"
    run = Run(device, args.rounds or (3 if quick else 21), args.backend, args.seed)
    elements = args.elements or (QUICK_ELEMENTS if quick else ELEMENTS)
    card = torch.cuda.get_device_name() if run.cuda else "CPU (times mean nothing)"
    print(f"{card}; torch {torch.__version__}; SpikingJelly IF, ILIF: {implementations(device)}")
    bandwidth = copy_bandwidth(run, elements)
    print(f"{elements} elements; copy {bandwidth / 1e12:.3f} TB/s; ours: backend {args.backend}")
    results = {
        "forward": forward_shares(run, elements, args.steps, bandwidth),
        "peers": beside_spikingjelly(run, elements, args.steps),
        "small": small_sizes(run, SMALL[:1] if quick else SMALL, 3 if quick else 100),
    }
    after = copy_bandwidth(run, elements)
    print_results(results)
    print(f"\ncopy again: {after / 1e12:.3f} TB/s")
    if args.json:
        record = {"card": card, "torch": torch.__version__, "run": asdict(run), **results}
        args.json.write_text(json.dumps({**record, "copy": [bandwidth, after]}, indent=1))
    return int(not all(r["exact"] for r in results["forward"]))


if __name__ == "__main__":
    sys.exit(main())
