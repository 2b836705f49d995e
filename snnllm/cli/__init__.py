"""The command line: `snnllm convert | eval | generate | simulate | inspect | bench | reproduce | demo`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from snnllm import __version__


class _Command(NamedTuple):
    """A command: the module that has its options and runs it, and what it does in a few words."""

    module: str
    summary: str


_COMMANDS = {
    "convert": _Command("convert", "dense LLaMA -> spiking checkpoint"),
    "eval": _Command("evaluate", "perplexity and zero-shot tasks of a spiking or dense model"),
    "generate": _Command("generate", "continue a prompt"),
    "simulate": _Command("simulate", "record membranes and spikes, count operations and energy"),
    "inspect": _Command("inspect", "which matmuls are spiking, T, coding, bytes"),
    "bench": _Command("bench", "time prefill and decoding beside the dense model"),
    "reproduce": _Command("reproduce", "the tables of the paper on any LLaMA"),
    "demo": _Command("demo", "the whole way on a small real model"),
}

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


class _CommandParser(argparse.ArgumentParser):
    """The parser of one command; it loads the module with the options when it has to parse them."""

    def __init__(self, *args: Any, module: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse with the options of the command."""
        if self._module:
            module, self._module = self._module, ""
            importlib.import_module(f"snnllm.cli.{module}").add_options(self)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="snnllm",
        description="Turn LLaMA checkpoints into spiking neural networks and run them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snnllm {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    for name, command in _COMMANDS.items():
        commands.add_parser(name, help=command.summary, module=command.module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when done, 1 when a check failed, 2 on bad input (one line on standard error says what), 130 when
        interrupted, 141 when nobody reads the output.
    """
    if not sys.stderr.isatty():  # a log, no place for bars that move
        # Read when a command imports tqdm.
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    args = build_parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    try:
        code: int = args.run(args)
        sys.stdout.flush()  # here, where nobody reading is no error
        return code
    except KeyboardInterrupt:
        more = "; the same command continues" if getattr(args, "resumes", False) else ""
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `snnllm inspect MODEL | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if args.verbose:
            raise
        print(f"snnllm {args.command}: error: {error}", file=sys.stderr)
        return 2
