"""`snnllm simulate`: run a prompt over time steps; record membranes, count operations and energy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnllm.cli.checks import check_prompt
from snnllm.cli.options import open_model

if TYPE_CHECKING:
    from snnllm.operation_report import OperationReport


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Run a prompt through the unrolled view: NPZ, CSV and figures of the chosen "
        "neurons, and the operation report of all layers. The scripts of the package sims "
        "(python -m sims.membrane, sims.raster, sims.equivalence, sims.sweep) offer more."
    )
    parser.add_argument("model", type=Path, help="spiking checkpoint")
    parser.add_argument("prompt", help="text that the model reads")
    parser.add_argument("--output", type=Path, default=Path("simulation"), help="results folder")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["model.layers.0.self_attn.q_proj"],
        metavar="PATTERN",
        help="spiking modules to record, shell-style patterns in quotes (default: %(default)s)",
    )
    parser.add_argument("--tokens", default="all", help="positions like 0,3,8:16 or all")
    parser.add_argument(
        "--channels",
        default="auto:6",
        help="of the membranes: like 0,3,8:16, all, salient, auto:N (default: auto:6); spikes and "
        "rates are recorded of all channels",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        default=256,
        metavar="MIB",
        help="of a recording (default: 256)",
    )
    parser.set_defaults(run=run, view=None, device="cpu")


def run(args: argparse.Namespace) -> int:
    """Record, count and write; print the totals."""
    check_prompt(args.prompt)
    model, tokenizer = open_model(str(args.model), args, only_spiking=True)
    files, report = simulate(
        str(args.model),
        model,
        tokenizer,
        args.prompt,
        args.output,
        args.layers,
        args.tokens,
        args.channels,
        int(args.memory_limit * 2**20),
    )
    print(f"{report.totals_markdown()}\n")
    print("\n".join(f"wrote {path}" for path in files))
    return 0


def simulate(
    name: str,
    model: Any,
    tokenizer: Any,
    prompt: str,
    output: Path,
    layers: list[str],
    tokens: str = "all",
    channels: str = "auto:6",
    memory_limit: int = 256 << 20,
) -> tuple[list[Path], OperationReport]:
    """Record a prompt and count its operations; returns the files written, and what was counted.

    Raises:
        ValueError: A layer, token or channel does not exist.
    """
    # The one place where the command line reaches up to the scripts (architecture test).
    from sims import membrane, raster
    from sims.common import Subject, check_folder, recorder_of
    from snnllm.operations import count_operations

    check_folder(output)
    subject = Subject(name, model, tokenizer)
    # Of the two recordings the larger one, with all channels: refused before anything is written.
    recorder_of(subject, prompt, layers, tokens, "all", memory_limit)
    files = membrane.simulate(subject, prompt, layers, tokens, channels, memory_limit, output)
    files += raster.simulate(subject, prompt, layers, tokens, "all", memory_limit, output)
    report = count_operations(model, tokenizer(prompt, return_tensors="pt").input_ids)
    for path, text in (
        (output / "operations.json", json.dumps(report.to_dict(), indent=2)),
        (output / "operations.md", report.to_markdown()),
    ):
        path.write_text(text + "\n", encoding="utf-8")
        files.append(path)
    return files, report
