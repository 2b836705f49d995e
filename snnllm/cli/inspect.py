"""`snnllm inspect`: which matmuls are spiking, T, coding, bytes."""

from __future__ import annotations

import argparse
import dataclasses
import json

from snnllm.cli.options import open_model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = "List every matmul of a checkpoint: operands, steps, shape, stored bytes."
    parser.add_argument("model", help="spiking checkpoint or dense LLaMA")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run, view=None, device="cpu")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    model, _ = open_model(args.model, args)
    from snnllm.inspection import matmuls, table

    rows = matmuls(model)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in rows], indent=2))
    else:
        print(table(rows))
    return 0
