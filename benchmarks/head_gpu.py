"""Output head and token embedding in 8 bits on a GPU, beside torch's in bf16.

    python benchmarks/head_gpu.py                       # the table
    python benchmarks/head_gpu.py --sweep --rows 1 16   # tiles of the head, best first

Every contender is a CUDA graph that walks through copies of its table, more than 4 times the L2 cache in all; the
graphs are replayed in turn, medians count. TB/s are those of the codes. Before a head is timed, its logits are
compared with those of torch. Without a GPU the exit status is 77 (skipped).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from linear_gpu import SKIPPED, Contender, copies_of, graph_of, medians
from torch import Tensor
from torch.nn import functional

from snnllm.kernels.triton.backend import TritonBackend
from snnllm.vocabulary import QuantizedTable, quantize_table, reference_logits

TABLES = ("32000x4096", "128256x4096", "49152x576")
ROWS = (1, 4, 16, 64, 1024)
_CANDIDATES = [
    *((16, tokens, 128, 2, stages) for tokens in (32, 64, 128) for stages in (3, 4, 6)),
    *((16, 64, 256, 2, 3), (16, 64, 64, 2, 6), (32, 64, 128, 2, 4), (64, 64, 64, 2, 4)),
]


def tables(tokens: int, channels: int) -> tuple[list[Tensor], list[QuantizedTable]]:
    """Copies of a random table in bf16, and of its codes."""
    table = 0.02 * torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
    codes, scale = quantize_table(table)
    return (
        [table.clone() for _ in range(copies_of(2 * table.numel()))],
        [QuantizedTable(codes.clone(), scale.clone()) for _ in range(copies_of(table.numel()))],
    )


def agree(x: Tensor, table: QuantizedTable, logits: Tensor) -> bool:
    """Whether logits are those of torch, up to the order of float32 sums and one rounding."""
    expected = reference_logits(x.float(), *table)
    sizes = reference_logits(x.float().abs(), table.codes.abs(), table.scale)
    error = (logits.float() - expected).abs()
    return bool((error <= 2.0**-19 * sizes + 2.0**-8 * expected.abs()).all())


def measure(tokens: int, channels: int, all_rows: list[int]) -> None:
    """Print times of a table in us and ratios to bf16."""
    from snnllm.kernels.triton.vocabulary import embed, head_logits

    dense, ours = tables(tokens, channels)
    for rows in all_rows:
        x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        ids = torch.randint(tokens, (rows,), device="cuda")
        good = agree(x, ours[0], head_logits(x, *ours[0]))
        graphs: dict[str, Contender] = {
            "head bf16": graph_of([partial(functional.linear, x, table) for table in dense]),
            "head": graph_of([partial(head_logits, x, *table) for table in ours]),
            "embedding bf16": graph_of([partial(functional.embedding, ids, t) for t in dense]),
            "embedding": graph_of([partial(embed, ids, *t, torch.bfloat16) for t in ours]),
        }
        time = medians(graphs)
        ratio = [time[f"{name} bf16"] / time[name] for name in ("head", "embedding")]
        speed = tokens * channels / time["head"] / 1e6
        print(
            f"| {tokens}x{channels} | {rows} | {time['head bf16']:.1f} | {time['head']:.1f} ({ratio[0]:.2f}x) | "
            f"{speed:.2f} | {time['embedding bf16']:.1f} | {time['embedding']:.1f} ({ratio[1]:.2f}x) | "
            f"{'yes' if good else 'NO'} |",
            flush=True,
        )


def sweep(tokens: int, channels: int, all_rows: list[int]) -> None:
    """Print the time of the head with other tiles, best first."""
    from snnllm.kernels.triton import vocabulary

    chosen, (dense, ours) = vocabulary.choose_tiles, tables(tokens, channels)
    for rows in all_rows:
        x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        calls: list[Callable[[], Any]] = [partial(vocabulary.head_logits, x, *t) for t in ours]
        graphs = {"bf16": graph_of([partial(functional.linear, x, table) for table in dense])}
        graphs["chosen"] = graph_of(calls)
        for given in _CANDIDATES:
            tiles = vocabulary.Tiles(*given)
            vocabulary.choose_tiles = lambda *_, tiles=tiles: tiles
            try:
                graphs[str(given)] = graph_of(calls)
            except Exception as error:  # out of shared memory or registers
                print(f"{given}: {str(error).splitlines()[0][:90]}")
        vocabulary.choose_tiles = chosen
        ranking = sorted(medians(graphs).items(), key=lambda item: item[1])
        print(f"{tokens}x{channels} M={rows}: " + ", ".join(f"{c} {t:.1f}" for c, t in ranking))


def main(argv: list[str] | None = None) -> int:
    """Print the table or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), help="tokens x channels")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="hidden states, M")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the head instead")
    args = parser.parse_args(argv)
    reason = TritonBackend().available()
    if reason is not None or not torch.cuda.is_available():
        cause = reason or "there is no CUDA device"
        print(f"head_gpu measures Triton kernels on a GPU: {cause}; skipped.", file=sys.stderr)
        return SKIPPED
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if not args.sweep:
        print(
            "| table | M | head bf16, us | head | TB/s | embedding bf16, us | embedding | agrees |"
        )
        print("|---" * 8 + "|")
    for sizes in args.tables:
        tokens, channels = map(int, sizes.split("x"))
        (sweep if args.sweep else measure)(tokens, channels, args.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
