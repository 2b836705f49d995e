"""Collapsed linears on a GPU beside bf16 and other low-bit kernels: time of one linear, bf16 in and out.

    python benchmarks/linear_gpu.py                       # the table
    python benchmarks/linear_gpu.py --sweep --rows 1 16   # kernel shapes, best first

Every contender is a CUDA graph that walks through copies of its weights, more than 4 times the L2
cache in all; the graphs are replayed in turn, medians count. Our time includes the encoding, that of
humming-kernels (W4A8, optional) its quantisation. Before it is timed, the integers of every case are
compared with those of the reference backend. A second table holds ternary weights of 1.0 and 1.4 steps
on average (10 % of the columns with T = 5), whose outputs for float inputs (A16) are compared with
float64. Without a GPU the exit status is 77 (skipped).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snnllm.kernels import EncoderSpec, LinearSpec, ReferenceBackend, segments_of
from snnllm.kernels.cuda import linear as cuda_linear
from snnllm.kernels.cuda.linear import Rows, Tiles
from snnllm.kernels.ternary.pack import CountedTernary, counted_linear, packed_linear
from snnllm.kernels.triton import backend as triton_backend
from snnllm.kernels.triton.backend import TritonBackend, TritonLinear
from snnllm.layout import LinearLayout
from snnllm.step_allocation import GROUP_SIZE, classes_of, threshold_runs
from snnllm.ternary import TernaryWeight
from snnllm.ternary_linear import TernaryLinear
from snnllm.transforms import salient_count

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 16, 256, 4096)
REPLAYS = 15
SKIPPED = 77
Contender = tuple[Any, Sequence[Callable[[], Any]]]
CANDIDATES: dict[int, list[tuple[int, ...]]] = {  # Triton
    1: [(0, bn, kw, w) for bn in (4, 8, 16) for kw in (64, 256) for w in (2, 4)],
    16: [(16, bn, w, s, 0) for bn in (32, 64) for w in (2, 4) for s in (4, 6, 8)],
    256: [(bm, bn, 4, s, r) for bm, bn in ((64, 128), (64, 64)) for s in (3, 4) for r in (0, 168)],
    4096: [
        *((64, 128, 4, s, 0) for s in (3, 4)),
        *((128, 64, 4, s, 0) for s in (3, 4)),
        *((128, 128, 8, s, 0) for s in (3, 4)),
    ],
}
_FEW = [
    Rows(*c) for c in ((2, 6, 1), (2, 4, 1), (2, 3, 2), (2, 2, 3), (4, 4, 1), (4, 2, 2), (1, 4, 3))
]
_MANY = [
    *(Tiles(64, 128, 2, stages, 32) for stages in (6, 8)),
    *(Tiles(*c) for c in ((128, 128, 2, 6, 64), (128, 192, 3, 4, 0), (64, 192, 3, 8, 0))),
    *(Tiles(*c) for c in ((128, 64, 1, 8, 32), (64, 64, 1, 10, 32))),
]
CUDA_CANDIDATES: dict[int, list[Rows] | list[Tiles]] = {
    1: _FEW,
    16: _FEW,
    256: _MANY,
    4096: [
        *(Tiles(128, 256, 2, *c) for c in ((4, 52), (3, 20), (3, 28))),
        *(Tiles(*c) for c in ((128, 128, 2, 6, 64), (128, 192, 3, 4, 0))),
    ],
}


def random_linear(
    n: int, k: int, salient: float, steps: int, bits: int, commensurate: bool = False
) -> LinearSpec:
    """A linear with random codes on the GPU; about `salient` of the channels have T = `steps`.

    As many as the pipeline `rotated` takes, a power of two (512 of 4096, 1024 of 11008 for 10 %), and where it puts
    them, in front.
    """
    generator = torch.Generator("cuda").manual_seed(n + k)
    high = 2 ** (bits - 1)
    few = salient_count(k, salient)
    sizes, capacities = ((k - few, few), (15, 15 * steps)) if few else ((k,), (15,))
    order = torch.arange(k).roll(-few)  # the salient channels, the first ones, come last
    levels = torch.randint(-high, high, (n, k), generator=generator, device="cuda")
    return LinearSpec(
        encoder=EncoderSpec(
            order if few else None,
            *(sizes, capacities),
            name="linear",
            commensurate=commensurate,
        ),
        levels=levels.to(torch.int8),
        scale=torch.rand(n, 1, generator=generator, device="cuda") * 0.01,
        zero=torch.randint(-2, 2, (n, 1), generator=generator, device="cuda").int(),
        bias=None,
        segments=segments_of(sizes),
        weight_bits=bits,
    )


def ternary_layer(n: int, k: int, mean_steps: float, bits: int) -> TernaryLinear:
    """A linear with random spikes on the GPU; of its inputs, if spiking, 10 % have T = 2."""
    generator = torch.Generator().manual_seed(n + k)
    steps = torch.ones(k, dtype=torch.int64)
    steps[: round((mean_steps - 1) / 4 * k)] = 5
    classes = classes_of(steps)
    levels = [torch.randint(-t, t + 1, (n, count), device="cuda") for t, count in classes]
    runs = len(threshold_runs(classes, GROUP_SIZE))
    trains = TernaryWeight(
        torch.cat(levels, 1).to(torch.int8),
        (torch.rand(n, runs, generator=generator) * 0.01 + 0.001).half(),
        torch.randperm(k, generator=generator),
        classes,
    )
    spiking = (bits, (1, 2)) if bits < 16 else (bits, (1,))
    layout = LinearLayout(2, *spiking, "split", "steps", GROUP_SIZE, classes=classes)
    layer = TernaryLinear(k, n, False, layout, "ternary").cuda()
    if bits < 16:
        layer.set_channel_group((torch.rand(k, generator=generator) < 0.1).to(torch.uint8).cuda())
    layer.set_weight(trains)
    return layer


def graph_of(calls: Sequence[Callable[[], Any]]) -> Contender:
    """A CUDA graph of some calls, with the calls, which keep alive what the graph reads."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, calls


def medians(graphs: dict[str, Contender]) -> dict[str, float]:
    """Time of one call of every contender in us, replayed in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(REPLAYS + 3):
        for name, (graph, calls) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn >= 3:  # warm
                times[name].append(1000 * start.elapsed_time(stop) / len(calls))
    return {name: statistics.median(values) for name, values in times.items()}


def copies_of(nbytes: int) -> int:
    """Copies of a weight that exceed 4 times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def rotated(layer: TritonLinear) -> list[TritonLinear]:
    """Copies of a layer with weights of their own in memory."""
    weight = layer.arguments[0]
    assert weight is not None
    out = []
    for _ in range(copies_of(weight.numel())):
        copied = (weight.clone(), *layer.arguments[1:])
        out.append(dataclasses.replace(layer, arguments=copied))
    return out


def exact(x: Tensor, spec: LinearSpec) -> bool:
    """Whether accumulators and outputs are those of the reference."""
    ours, reference = TritonBackend(), ReferenceBackend()
    mine, theirs = ours.prepare(spec), reference.prepare(spec)
    same = torch.equal(ours.accumulate(x, mine), reference.accumulate(x, theirs))
    return same and torch.equal(ours.linear(x, mine), reference.linear(x, theirs))


def ours(x: Tensor, spec: LinearSpec, encoded: bool = False) -> Contender:
    """The graph of our linear; `encoded`: without the encoding."""
    backend = TritonBackend()
    layers = rotated(backend.prepare(spec))
    if encoded:
        rows = triton_backend.encode_plan(x, layers[0].plan)
        calls: list[Callable[[], Any]] = [
            partial(triton_backend.multiply, rows, layer, x.dtype) for layer in layers
        ]
    else:
        calls = [partial(backend.linear, x, layer) for layer in layers]
    return graph_of(calls)


def packed(x: Tensor, layer: TernaryLinear) -> Contender:
    """The graph of a ternary linear."""
    weight = layer.packed_weight()
    one = weight.packed if isinstance(weight, CountedTernary) else weight
    assert one is not None
    copies = [one._replace(weight=one.weight.clone()) for _ in range(copies_of(one.weight.numel()))]
    if not isinstance(weight, CountedTernary):
        return graph_of([partial(packed_linear, x, copied, None) for copied in copies])
    layers = [weight._replace(packed=copied) for copied in copies]
    return graph_of([partial(counted_linear, x, copied, None, x.dtype) for copied in layers])


def accurate(x: Tensor, layer: TernaryLinear) -> bool:
    """Whether the integers and outputs of spiking inputs are those of the reference.

    Outputs of float inputs: those of float64, up to the rounding of their sums and of bfloat16.
    """
    if layer.layout.activation_bits < 16:
        reference = ReferenceBackend()
        expected = reference.prepare(layer.spec())
        same = torch.equal(layer.accumulators(x), reference.accumulate(x, expected))
        return same and torch.equal(layer(x), reference.linear(x, expected))
    weight = layer.dequantized_weight().double().T
    exact, reach = x.double() @ weight, x.double().abs() @ weight.abs()
    error = (layer(x).double() - exact).abs()
    return bool((error <= 2.0**-19 * reach + 2.0**-8 * exact.abs()).all())


def dense(x: Tensor, n: int) -> Contender:
    """The graph of torch's bf16 linear."""
    weights = [
        torch.randn(n, x.shape[1], device="cuda", dtype=torch.bfloat16)
        for _ in range(copies_of(2 * n * x.shape[1]))
    ]
    return graph_of([partial(torch.nn.functional.linear, x, w) for w in weights])


def humming(x: Tensor, n: int) -> Contender | None:
    """The graph of humming's W4A8 linear, or None without the package."""
    try:
        layer_type = importlib.import_module("humming.layer").HummingLayer
    except ImportError:
        return None
    layer = layer_type(
        shape_n=n,
        shape_k=x.shape[1],
        weight_config={"dtype": "int4", "group_size": 0},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(n, x.shape[1], device="cuda", dtype=torch.bfloat16))
    layer.transform()
    layers = [layer] + [copy.deepcopy(layer) for _ in range(copies_of(n * x.shape[1] // 2) - 1)]
    return graph_of([partial(layer, inputs=x) for layer in layers])


def table(shapes: list[tuple[int, int]], all_rows: list[int]) -> None:
    """Print times in us and ratios to bf16."""
    print(
        "| out x in | M | bf16 | humming W4A8 | W4A4 T = 2 | commensurate | one group "
        "| split, without encoding | commensurate, without encoding | W2 | exact |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for n, k in shapes:
        for m in all_rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            two = random_linear(n, k, 0.1, 2, 4)
            even = random_linear(n, k, 0.1, 2, 4, commensurate=True)
            same = exact(x, two) and exact(x, even)
            graphs = {"bf16": dense(x, n)}
            peer = humming(x, n)
            if peer is not None:
                graphs["humming"] = peer
            graphs["two"] = ours(x, two)
            graphs["even"] = ours(x, even)
            graphs["one"] = ours(x, random_linear(n, k, 0.0, 1, 4))
            graphs["kernel"] = ours(x, two, encoded=True)
            graphs["even kernel"] = ours(x, even, encoded=True)
            graphs["w2"] = ours(x, random_linear(n, k, 0.1, 2, 2))
            graphs["last"] = graphs["bf16"]
            time = medians(graphs)
            base = (time["bf16"] + time["last"]) / 2
            cells = [
                f"{time[c]:.1f} ({base / time[c]:.2f}x)" if c in time else "-"
                for c in ("humming", "two", "even", "one", "kernel", "even kernel", "w2")
            ]
            drift = abs(time["bf16"] / time["last"] - 1)
            note = "yes" if same else "NO"
            note += "" if drift < 0.03 else f", baseline drifted {100 * drift:.0f} %"
            print(f"| {n}x{k} | {m} | {base:.1f} | {' | '.join(cells)} | {note} |", flush=True)


def ternary_table(shapes: list[tuple[int, int]], all_rows: list[int]) -> None:
    """Print times of ternary weights in us, and ratios to the 4-bit linear."""
    print(
        "\n| out x in | M | bf16 | W4A4 T = 2 | TW1 A16 | TW1.4 A16 | TW1 A4 T = 2 | TW1.4 A4 T = 2 | exact |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for n, k in shapes:
        layers = [ternary_layer(n, k, mean, bits) for bits in (16, 4) for mean in (1.0, 1.4)]
        for m in all_rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            same = all(accurate(x[: min(m, 300)], layer) for layer in layers)
            graphs = {"bf16": dense(x, n), "w4": ours(x, random_linear(n, k, 0.1, 2, 4))}
            graphs |= {str(i): packed(x, layer) for i, layer in enumerate(layers)}
            time = medians(graphs)
            cells = [f"{time[str(i)]:.1f} ({time['w4'] / time[str(i)]:.2f}x)" for i in range(4)]
            print(
                f"| {n}x{k} | {m} | {time['bf16']:.1f} | {time['w4']:.1f} | {' | '.join(cells)} | "
                f"{'yes' if same else 'NO'} |",
                flush=True,
            )


def sweep(shapes: list[tuple[int, int]], all_rows: list[int], commensurate: bool) -> None:
    """Print the time of every candidate, best first; commensurate: of the linear with such thresholds."""
    from snnllm.kernels.triton import operators as triton_ops

    module: Any
    candidates: Any
    for n, k in shapes:
        reason = cuda_linear.unsuitable(torch.device("cuda", 0), n, 4, 2)
        if reason is None:
            module, name, candidates = cuda_linear, "choose_shape", CUDA_CANDIDATES
        else:
            print(f"Triton kernels: {reason}")
            module, name, candidates = triton_ops, "choose_config", CANDIDATES
        chosen = getattr(module, name)
        for m in all_rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            spec = random_linear(n, k, 0.1, 2, 4, commensurate)
            graphs: dict[str, Contender] = {"bf16": dense(x, n)}
            for config in candidates[min(candidates, key=lambda c: abs(c - m))]:
                setattr(module, name, lambda *_, config=config: config)
                try:
                    graphs[str(config)] = ours(x, spec, encoded=True)
                except Exception as error:  # out of shared memory or registers
                    print(f"{config}: {str(error).splitlines()[0][:90]}")
            setattr(module, name, chosen)
            time = medians(graphs)
            ranking = sorted(time.items(), key=lambda item: item[1])
            print(f"{n}x{k} M={m}: " + ", ".join(f"{c} {t:.1f}" for c, t in ranking), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the table or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="tokens, M")
    parser.add_argument("--sweep", action="store_true", help="time tile sizes instead")
    parser.add_argument("--commensurate", action="store_true", help="of a --sweep: such thresholds")
    parser.add_argument("--ternary", action="store_true", help="the table of ternary weights only")
    parser.add_argument("--no-ternary", action="store_true", help="without it")
    args = parser.parse_args(argv)
    reason = TritonBackend().available()
    if reason is not None or not torch.cuda.is_available():
        cause = reason or "there is no CUDA device"
        print(f"linear_gpu measures Triton kernels on a GPU: {cause}; skipped.", file=sys.stderr)
        return SKIPPED
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.sweep:
        sweep(shapes, args.rows, args.commensurate)
        return 0
    if not args.ternary:
        table(shapes, args.rows)
    if args.ternary or not args.no_ternary:
        ternary_table(shapes, args.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
