"""How fast is a collapsed spiking linear on the CPU, next to a float32 linear of the same shape?

All contenders run in one process, one after the other in every round, and the medians are compared:
only the ratios mean something. The encoding of the activations is part of our time. Up to 16 rows
a call, the weights rotate over many layers, as they do in decoding, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from snnllm.kernels import EncoderSpec, LinearSpec, get_backend, segments_of

Call = Callable[[], torch.Tensor]

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
ROWS = (1, 16, 512)
FEWEST_ROUNDS = 9
ROTATED_ROWS = 16


def make_spec(n: int, k: int, bits: int, salient: float, generator: torch.Generator) -> LinearSpec:
    """Build a random linear [n, k]: 4-bit spikes, a share of the channels with two steps."""
    many = round(salient * k)
    sizes, capacities = (k - many, many), (15, 30)
    encoder = EncoderSpec(torch.randperm(k, generator=generator), sizes, capacities, name="bench")
    high = 2 ** (bits - 1)
    return LinearSpec(
        encoder=encoder,
        levels=torch.randint(-high, high, (n, k), generator=generator, dtype=torch.int8),
        scale=torch.rand(n, 1, generator=generator),
        zero=torch.randint(-high, high, (n, 1), generator=generator, dtype=torch.int32),
        bias=None,
        segments=segments_of(sizes),
        weight_bits=bits,
    )


def medians(contenders: dict[str, list[Call]], seconds: float) -> dict[str, float]:
    """Return the median time of a call in microseconds, contenders interleaved.

    Every contender has one call a layer; a round times one pass over all its layers.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for calls in contenders.values():
        _run(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float32"]) < FEWEST_ROUNDS:
        for name, calls in contenders.items():
            calls[0]()  # what ran before left its own data in the cache
            start = time.perf_counter()
            _run(calls)
            times[name].append((time.perf_counter() - start) / len(calls))
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def _run(calls: list[Call]) -> None:
    for call in calls:
        call()


def measure(m: int, n: int, k: int, args: argparse.Namespace) -> dict[str, float | int]:
    """Time one shape and check that the backends agree bit for bit."""
    generator = torch.Generator().manual_seed(args.seed)
    copies = 1 if m > ROTATED_ROWS else 1 + int(args.rotate_mb * 2**20 / (n * k * args.bits / 8))
    specs = [make_spec(n, k, args.bits, args.salient, generator) for _ in range(copies)]
    weights = [torch.randn(n, k, generator=generator) for _ in range(copies)]
    x = torch.randn(m, k, generator=generator)
    calls: dict[str, list[Call]] = {"float32": [partial(linear, x, w) for w in weights]}
    for name in args.backends:
        backend = get_backend(name)
        calls[name] = [partial(backend.linear, x, backend.prepare(spec)) for spec in specs]
    outputs = [calls[name][0]() for name in args.backends]
    if not all(torch.equal(outputs[0], output) for output in outputs):
        raise RuntimeError(f"the backends differ for M={m}, N={n}, K={k}")
    return {"M": m, "N": n, "K": k, **medians(calls, args.seconds)}


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main() -> None:
    """Run the benchmark and print one line a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M, tokens a call")
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=SHAPES, help="OUTxIN, e.g. 11008x4096"
    )
    parser.add_argument("--bits", type=int, default=4, help="bits of a weight level")
    parser.add_argument("--salient", type=float, default=0.1, help="share of two-step channels")
    parser.add_argument("--backends", nargs="+", default=["native", "reference"])
    parser.add_argument(
        "--rotate-mb", type=float, default=16, help="packed weights to rotate over (M <= 16)"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="time a shape and M")
    parser.add_argument("--threads", type=int, help="threads of torch and of the native backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the times here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print("times in us (only ratios mean something); speed-up over float32 F.linear in brackets")
    header = "".join(f"{name:>18}" for name in args.backends)
    print(f"{'out x in':>12} {'M':>4} {'float32':>9}{header}")
    results = []
    for n, k in args.shapes:
        for m in args.rows:
            row = measure(m, n, k, args)
            results.append(row)
            columns = [f"{f'{n}x{k}':>12} {m:>4} {row['float32']:9.1f}"]
            for name in args.backends:
                columns.append(f"{row[name]:8.1f} ({row['float32'] / row[name]:5.2f}x)")
            print(" ".join(columns), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
