"""How close to the speed of memory is encoding, alone and fused with what runs before it?

On a GPU, in one process: the time of every encoding kernel at shapes of LLaMA-7B, as a share of the
measured copy bandwidth with every input byte read once and every output byte written once; beside
it the same work in torch, and whether the integers are the same. Inputs rotate over more memory
than the cache holds. Then the latency of few rows, where launching is what takes time, in CUDA
graphs. Without a GPU there is nothing to measure: the exit status is 77 (skipped).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from neuron_speed import Run, copy_bandwidth, table
from torch import Tensor

from neurons import SpikeEncoder, backends

SKIPPED = 77
SHAPES = ((4096, 4096), (4096, 11008))  # tokens, channels
FEW_ROWS = (1, 16)
ROTATED_BYTES = 2**28  # of inputs; several times the L2 cache
COPIED = 2**27  # floats
CHECKED_ROWS = 64
IN_GRAPH = 50
EPS = 1e-5


@dataclass
class Layer:
    """A row encoder for K channels: groups, offsets and a rotation, random."""

    channels: int
    salient: float
    seed: int = 0
    first: bool = False  # the salient channels come first
    rotated: bool = False  # and last, as many as are rotated together

    def __post_init__(self) -> None:
        """Draw everything on the GPU."""
        from neurons.backends.triton_encode import stable_layout
        from neurons.backends.triton_encode_tiles import runs_of
        from snnllm.hadamard import OnlineRotation
        from snnllm.transforms import salient_count

        generator = torch.Generator().manual_seed(self.seed)
        many = round(self.salient * self.channels)
        rotated = salient_count(self.channels, self.salient)
        group = torch.zeros(self.channels, dtype=torch.uint8)
        salient = torch.randperm(self.channels, generator=generator)[:many]
        if self.first:
            salient = torch.arange(many // 4 * 4)
        elif self.rotated:
            salient = torch.arange(self.channels - rotated, self.channels)
        group[salient] = 1
        steps = (1, 2) if many else (1,)
        self.encoder = SpikeEncoder(group, steps, 4, backend="torch").cuda()
        self.order, self.segments = stable_layout(self.encoder.channel_group, len(steps))
        self.runs = runs_of(self.order, self.segments, len(steps), self.channels)
        self.capacities = torch.tensor(self.encoder.capacities, dtype=torch.float32).cuda()
        self.offset = torch.randn(self.channels, generator=generator).cuda() * 0.1
        self.gain = torch.rand(self.channels, generator=generator).add(0.5).bfloat16().cuda()
        self.rotation = OnlineRotation((self.channels - rotated, rotated))

    def layout(self, gather: bool = True, offset: bool = False) -> tuple[Any, ...]:
        """Arguments of the encoding kernels behind the inputs."""
        order = self.order if gather else None
        taken = self.offset if offset else None
        return order, self.segments, self.capacities, self.encoder.clip, 0, taken

    def expected(self, row: Tensor, offset: bool = False) -> tuple[Tensor, ...]:
        """Counts in encoded order, thresholds and bias charges by torch."""
        encoding = self.encoder.encode(row.float() - self.offset if offset else row)
        count = encoding.count.index_select(1, self.order.clamp(min=0))
        return torch.where(self.order >= 0, count, 0), encoding.threshold, encoding.zero_point


@dataclass
class Contender:
    """A kernel, and the same in torch.

    Attributes:
        inputs: activations it reads.
        kernel: from the inputs to what it writes.
        reference: from the inputs to counts, thresholds and bias charges.
    """

    inputs: tuple[Tensor, ...]
    kernel: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]

    def bytes(self) -> int:
        """Read once and written once."""
        given = {t.data_ptr() for t in self.inputs}
        written = [t for t in self.kernel(*self.inputs) if t.data_ptr() not in given]
        return sum(t.numel() * t.element_size() for t in (*self.inputs, *written))

    def is_exact(self) -> bool:
        """Whether the first and last rows have the integers and thresholds of torch."""
        rows = min(CHECKED_ROWS, len(self.inputs[0]))
        whole = self.kernel(*self.inputs)
        for part in (slice(0, rows), slice(len(self.inputs[0]) - rows, None)):
            expected = self.reference(*(t[part] for t in self.inputs))
            if not all(torch.equal(a[part], b) for a, b in zip(whole, expected, strict=False)):
                return False
        return True

    def rotating(self) -> list[tuple[Tensor, ...]]:
        """The inputs and copies of them, more than the cache holds."""
        size = sum(t.numel() * t.element_size() for t in self.inputs)
        copies = max(2, -(-ROTATED_BYTES // size))
        return [tuple(t.clone() for t in self.inputs) for _ in range(min(copies, 64))]


def contenders(rows: int, channels: int, seed: int) -> dict[str, Contender]:
    """Every kernel at one shape."""
    from neurons.backends.triton_encode import encode_rows
    from snnllm.kernels.triton.norm import rms_norm_encode
    from snnllm.kernels.triton.swiglu import silu_mul, silu_mul_encode
    from snnllm.norm import rms_norm

    one, two = Layer(channels, 0.0, seed), Layer(channels, 0.1, seed)
    front = Layer(channels, 0.1, seed, first=True)
    turned = Layer(channels, 0.1, seed, rotated=True)
    generator = torch.Generator("cuda").manual_seed(seed)

    def activations() -> Tensor:
        x = torch.randn(rows, channels, generator=generator, device="cuda")
        x[:, two.encoder.channel_group == 1] *= 8  # salient channels are outliers
        return x.bfloat16()

    x, y = activations(), activations()

    def in_place(layer: Layer) -> Callable[[Tensor], tuple[Tensor, ...]]:
        # What SpikeEncoder.encode runs, without its check for NaN, which waits for the device.
        encoder = layer.encoder
        return lambda x: backends.encode(
            x, encoder.channel_group, encoder.capacities, encoder.clip, False
        )

    def torch_mlp(gate: Tensor, up: Tensor, rotated: bool) -> tuple[Tensor, ...]:
        # The product is the kernel's own: its exponential differs from torch's in the last bit.
        product = silu_mul(gate, up)
        if rotated:
            return turned.expected(turned.rotation(product), True)
        return two.expected(product)

    return {
        "1 group": Contender(
            (x,), lambda x: encode_rows(x, *one.layout(gather=False)), lambda x: one.expected(x)
        ),
        "2 groups": Contender(
            (x,),
            lambda x: encode_rows(x, *two.layout(), runs=two.runs),
            lambda x: two.expected(x),
        ),
        "2 groups, salient first": Contender(
            (x,),
            lambda x: encode_rows(x, *front.layout(), runs=front.runs),
            lambda x: front.expected(x),
        ),
        "2 groups, the kernel for all layouts": Contender(
            (x,), lambda x: encode_rows(x, *two.layout()), lambda x: two.expected(x)
        ),
        "2 groups, offset": Contender(
            (x,),
            lambda x: encode_rows(x, *two.layout(offset=True), runs=two.runs),
            lambda x: two.expected(x, True),
        ),
        "original order, 1 group": Contender((x,), in_place(one), lambda x: one.encoder.encode(x)),
        "original order, 2 groups": Contender((x,), in_place(two), lambda x: two.encoder.encode(x)),
        "norm, 2 groups": Contender(
            (x,),
            lambda x: rms_norm_encode(x, None, two.gain, EPS, *two.layout(), runs=two.runs)[:4],
            lambda x: two.expected(rms_norm(x, two.gain, EPS)),
        ),
        "residual, norm, 2 groups": Contender(
            (x, y),
            lambda x, y: rms_norm_encode(x, y, two.gain, EPS, *two.layout(), runs=two.runs)[:5],
            lambda x, y: two.expected(rms_norm(x + y, two.gain, EPS)),
        ),
        "SiLU * up, 2 groups": Contender(
            (x, y),
            lambda x, y: silu_mul_encode(x, y, None, *two.layout(), runs=two.runs),
            lambda x, y: torch_mlp(x, y, False),
        ),
        "SiLU * up, 2 groups, salient first": Contender(
            (x, y),
            lambda x, y: silu_mul_encode(x, y, None, *front.layout(), runs=front.runs),
            lambda x, y: front.expected(silu_mul(x, y)),
        ),
        "SiLU * up, rotation, offset, 2 groups": Contender(
            (x, y),
            lambda x, y: silu_mul_encode(
                x, y, turned.rotation.sizes, *turned.layout(offset=True), runs=turned.runs
            ),
            lambda x, y: torch_mlp(x, y, True),
        ),
    }


def chosen(rows: int, channels: int, seed: int, only: str) -> dict[str, Contender]:
    """The kernels whose name holds a text."""
    return {k: c for k, c in contenders(rows, channels, seed).items() if only in k}


def throughput(
    run: Run, shapes: Sequence[tuple[int, int]], bandwidth: float, only: str
) -> list[dict]:
    """Times at many rows, as a share of the copy bandwidth and beside torch."""
    results = []
    for rows, channels in shapes:
        for name, contender in chosen(rows, channels, run.seed, only).items():
            inputs = contender.rotating()
            calls = {
                "kernel": lambda c=contender, i=inputs: [c.kernel(*given) for given in i],
                "torch": lambda c=contender, i=inputs: [c.reference(*given) for given in i[:2]],
            }
            times = run.medians(calls)
            kernel, reference = times["kernel"] / len(inputs), times["torch"] / 2
            size = contender.bytes()
            results.append(
                {
                    "rows": rows,
                    "channels": channels,
                    "what": name,
                    "us": kernel,
                    "bytes": size,
                    "share": 1e6 * size / kernel / bandwidth,
                    "torch us": reference,
                    "exact": contender.is_exact(),
                }
            )
            del inputs
    return results


def latency(run: Run, rows: Sequence[int], channels: Sequence[int], only: str) -> list[dict]:
    """Times of few rows inside a CUDA graph."""
    results = []
    for many in rows:
        for width in channels:
            for name, contender in chosen(many, width, run.seed, only).items():
                exact = contender.is_exact()  # compiles, too: a graph cannot
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(IN_GRAPH):
                        contender.kernel(*contender.inputs)
                microseconds = run.medians({"graph": graph.replay})["graph"] / IN_GRAPH
                results.append(
                    {
                        "rows": many,
                        "channels": width,
                        "what": name,
                        "us": microseconds,
                        "exact": exact,
                    }
                )
    return results


def print_results(many: list[dict], few: list[dict]) -> None:
    """Print both tables."""
    table(
        "bfloat16 in, uint8 counts out",
        (
            "tokens x channels",
            "what",
            "us",
            "GB",
            "share of copy",
            "torch eager, us",
            "ratio",
            "integers equal",
        ),
        [
            (
                *(f"{r['rows']} x {r['channels']}", r["what"], f"{r['us']:.1f}"),
                *(f"{r['bytes'] / 1e9:.3f}", f"{r['share']:.1%}", f"{r['torch us']:.0f}"),
                *(f"{r['torch us'] / r['us']:.1f}x", "yes" if r["exact"] else "NO"),
            )
            for r in many
        ],
    )
    table(
        "Few rows, in a CUDA graph",
        ("tokens x channels", "what", "us", "integers equal"),
        [
            (
                *(f"{r['rows']} x {r['channels']}", r["what"], f"{r['us']:.2f}"),
                "yes" if r["exact"] else "NO",
            )
            for r in few
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if an integer differs from the reference, 77 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="median of so many")
    parser.add_argument("--rows", type=int, help="tokens, instead of 4096")
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "encode_speed measures CUDA kernels and found no CUDA device: skipped.", file=sys.stderr
        )
        return SKIPPED
    run = Run("cuda", args.rounds, "triton", args.seed)
    shapes = [(args.rows or rows, channels) for rows, channels in SHAPES]
    card = torch.cuda.get_device_name()
    with torch.no_grad():
        bandwidth = copy_bandwidth(run, COPIED)
        print(f"{card}; torch {torch.__version__}; copy {bandwidth / 1e12:.3f} TB/s", flush=True)
        many = throughput(run, shapes, bandwidth, args.only)
        few = latency(run, FEW_ROWS, [channels for _, channels in SHAPES], args.only)
        after = copy_bandwidth(run, COPIED)
    print_results(many, few)
    print(f"\ncopy again: {after / 1e12:.3f} TB/s")
    if args.json:
        record = {"card": card, "torch": torch.__version__, "copy": [bandwidth, after]}
        args.json.write_text(json.dumps({**record, "many": many, "few": few}, indent=1))
    return int(not all(r["exact"] for r in many + few))


if __name__ == "__main__":
    sys.exit(main())
