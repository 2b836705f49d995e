"""The command line: `snnllm convert | eval | generate | simulate | inspect | bench | reproduce | demo`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from snnllm import __version__

_EPILOG = """examples:
  snnllm demo                                      the whole way on a small real model
  snnllm convert MODEL out --preset W4A4T2         dense LLaMA -> spiking checkpoint
  snnllm eval out --text wikitext2:test            perplexity
  snnllm generate out "The capital of France is"   text
  snnllm simulate out "A prompt" --output rec      membranes, spikes, operations, energy
  snnllm inspect out                               which matmuls are spiking
  snnllm bench --shape 7B --device cuda            tokens per second beside the dense model
  snnllm reproduce all --model MODEL --quick       the tables of the paper

exit codes: 0 done, 1 a check failed, 2 bad input (the message says what to change)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    # Here, because they load transformers: `snnllm --version` need not wait for it.
    from snnllm.cli import bench, convert, demo, evaluate, generate, inspect, reproduce, simulate

    parser = argparse.ArgumentParser(
        prog="snnllm",
        description="Turn LLaMA checkpoints into spiking neural networks and run them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snnllm {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (convert, evaluate, generate, simulate, inspect, bench, reproduce, demo):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when done, 1 when a check failed, 2 on bad input (one line on standard error says what).
    """
    if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"snnllm {__version__}")
        return 0
    args = build_parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if args.verbose:
            raise
        print(f"snnllm {args.command}: error: {error}", file=sys.stderr)
        return 2
