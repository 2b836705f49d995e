"""`snnllm bench`: how fast a model prefills and decodes, beside the dense one, in one run."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnllm.cli.checks import check_at_least_one, check_folder_of, check_usable, checked_device
from snnllm.config import FLOAT_BITS, Operands, SpikeConfig, ValueRange
from snnllm.shapes import SHAPES
from snnllm.views import View

if TYPE_CHECKING:
    import torch

    from snnllm.speed import Contender

_DENSE = ("eager", "compiled")
_PRESET = "W4A4T2"
_STATIC = {"cache_implementation": "static"}
_DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Time to the first token and decoded tokens a second of a spiking model and of the "
        "dense one in transformers' generate, with random weights of any shape or real ones."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape", choices=[*SHAPES], help="random weights of this shape (default: smollm2)"
    )
    what.add_argument(
        "--model", help="dense LLaMA; converted by rtn for the occasion without a checkpoint"
    )
    parser.add_argument("--checkpoint", type=Path, help="spiking checkpoint of --model")
    parser.add_argument("--blocks", type=int, help="with --shape: fewer blocks than it has")
    parser.add_argument(
        "--preset", help=f"of a spiking model without checkpoint (default: {_PRESET})"
    )
    parser.add_argument(
        "--attention",
        choices=[*map(str, Operands)],
        help="with --shape: encode Q, K and V or leave them in float",
    )
    parser.add_argument(
        "--range",
        choices=[*map(str, ValueRange)],
        help=f"of a spiking model without checkpoint (default: {ValueRange.SPLIT})",
    )
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=[8, 16],
        help="of embedding and head of a spiking model without checkpoint (default: 16, float)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at a time")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens of a repetition")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; the median counts")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*_DENSE, *map(str, View)],
        help="eager and compiled: the dense model, the latter with a static cache; the views of the "
        "spiking one (default: eager, compiled on a GPU, collapsed)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is a GPU)")
    parser.add_argument(
        "--dtype",
        choices=[*_DTYPES],
        help="of both models (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        contender: Who.
        batch: Prompts at a time.
        prompt: Tokens of a prompt.
        first_ms: To the first token.
        tokens_s: Decoded tokens a second, of all prompts.
        weights_gb: Of the model on its device, in 10^9 bytes.
        peak_gb: Most memory of the GPU in use, in 10^9 bytes; None on a CPU.
    """

    contender: str
    batch: int
    prompt: int
    first_ms: float
    tokens_s: float
    weights_gb: float
    peak_gb: float | None


def run(args: argparse.Namespace) -> int:
    """Measure and print one row for every contender, batch and prompt.

    Raises:
        ValueError: Options that do not go together, or numbers below 1.
    """
    _check(args)
    import torch

    device = checked_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = args.contenders or ["eager", *(["compiled"] * (device.type == "cuda")), "collapsed"]
    print(
        f"{_machine(device)}, torch {torch.__version__}, {args.model or _shape(args)}, {_label(args)}"
    )
    print(
        "| model | batch | prompt | first token, ms | decoded tokens/s | weights, GB | peak, GB |"
    )
    print("|---" * 7 + "|")
    rows: list[Row] = []
    for names in _groups(chosen, device):
        rows += _measure(names, args, device)
        gc.collect()
        if device.type == "cuda":
            torch.compiler.reset()  # compiled calls hold memory of the model
            torch.cuda.empty_cache()
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def _check(args: argparse.Namespace) -> None:
    check_at_least_one(args, "batch", "prompt", "tokens", "repeat", "blocks")
    check_folder_of("--json", args.json)
    for option in ("preset", "range", "embedding_bits"):
        if args.checkpoint is not None and getattr(args, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} goes without --checkpoint, which has one of its own.")
    args.preset = args.preset or _PRESET
    if args.model is None:
        args.shape = args.shape or "smollm2"
        if args.checkpoint is not None:
            raise ValueError("--checkpoint needs --model, the dense model that it came from.")
        most = SHAPES[args.shape].blocks
        if args.blocks is not None and args.blocks > most:
            raise ValueError(f"--blocks must be at most {most}, those of {args.shape}.")
    elif args.blocks is not None or args.attention is not None:
        raise ValueError("--blocks and --attention go with --shape; a model has its own.")
    else:
        check_usable(args, args.model)
    if args.checkpoint is None:
        _spike(args)


def _spike(args: argparse.Namespace) -> SpikeConfig:
    """The configuration of a model without checkpoint, before its pipeline."""
    given = {
        "attention": args.attention,
        "value_range": args.range,
        "embedding_bits": args.embedding_bits,
    }
    return SpikeConfig.preset(args.preset, **{k: v for k, v in given.items() if v is not None})


def _shape(args: argparse.Namespace) -> str:
    blocks = (
        "" if args.blocks is None else f" ({args.blocks} of {SHAPES[args.shape].blocks} blocks)"
    )
    return f"{args.shape}{blocks} with random weights"


def _label(args: argparse.Namespace) -> str:
    if args.checkpoint is None:
        spike = _spike(args)
        label = spike.label + (f" {args.range}" if args.range is not None else "")
    else:
        from snnllm.modeling import SpikingLlamaConfig

        spike = SpikingLlamaConfig.from_pretrained(args.checkpoint).spike
        label = spike.label
    bits = spike.embedding_bits
    return label if bits == FLOAT_BITS else f"{label}, embedding and head of {bits} bits"


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    import torch

    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _config(args: argparse.Namespace) -> Any:
    from snnllm.random_model import llama_config

    shape = SHAPES[args.shape]
    if args.blocks is not None:
        shape = shape._replace(blocks=args.blocks)
    return llama_config(shape, max(4096, *(p + args.tokens + 1 for p in args.prompt)))


def _dense(args: argparse.Namespace, device: torch.device) -> Any:
    from snnllm.random_model import random_dense
    from snnllm.sources import dense_model, open_source

    if args.model is None:
        return random_dense(_config(args), device, _dtype(args, device))
    return dense_model(open_source(args.model)).to(device, _dtype(args, device))


def _spiking(args: argparse.Namespace, device: torch.device) -> Any:
    from snnllm.conversion import convert
    from snnllm.data import load_text, random_windows, tokenize
    from snnllm.modeling import load
    from snnllm.pipelines.rotated import RotatedOptions, rotated_config
    from snnllm.random_model import random_spiking
    from snnllm.sources import open_source

    if args.checkpoint is not None:
        return load(args.checkpoint, _dtype(args, device)).to(device)
    spike = _spike(args)
    if args.model is None:
        spike = rotated_config(spike, RotatedOptions())  # what the default pipeline makes
        return random_spiking(_config(args), spike, device, _dtype(args, device))
    source = open_source(args.model)
    windows = random_windows(tokenize(load_text("pydoc:train"), source.tokenizer()), 128, 2, 0)
    with tempfile.TemporaryDirectory() as folder:
        convert(source, f"{folder}/out", spike, windows, pipeline="rtn")
        return load(f"{folder}/out", _dtype(args, device)).to(device)


def _groups(names: list[str], device: torch.device) -> list[list[str]]:
    """Contenders that are in memory together, the group of the first named one first: on a GPU those of one model."""
    if device.type != "cuda":
        return [names]
    groups: dict[bool, list[str]] = {}
    for name in names:
        groups.setdefault(name in _DENSE, []).append(name)
    return list(groups.values())


def _measure(names: list[str], args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows of some contenders, printed as they come."""
    dense = _dense(args, device) if any(n in _DENSE for n in names) else None
    spiking = _spiking(args, device) if any(n not in _DENSE for n in names) else None
    contenders = {n: _contender(n, dense if n in _DENSE else spiking, device) for n in names}
    # Interleaved where another program may be busy; one by one where each has a peak of memory.
    runs = [contenders] if device.type != "cuda" else [{n: c} for n, c in contenders.items()]
    rows = []
    for batch, prompt in itertools.product(args.batch, args.prompt):
        for run in runs:
            rows += _time(run, batch, prompt, args, device)
    return rows


def _contender(name: str, model: Any, device: torch.device) -> Contender:
    from snnllm.execution import use_view
    from snnllm.speed import Contender

    if name in _DENSE:
        return Contender(model, options=_STATIC if name == "compiled" else {})
    static = _STATIC if device.type == "cuda" and name == View.COLLAPSED else {}
    return Contender(model, partial(use_view, model, name), static)


def _time(
    contenders: Mapping[str, Contender],
    batch: int,
    prompt: int,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    import torch

    from snnllm.block import device_bytes
    from snnllm.speed import time_contenders

    models = [contender.model for contender in contenders.values()]
    for model in models:
        # transformers keeps static caches as long as the longest so far, which others would pay for.
        vars(model).pop("_previous_max_cache_length", None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models[0].config.vocab_size, (batch, prompt), generator=generator)
    timings = time_contenders(contenders, ids, ids, args.tokens, args.repeat)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    rows = [
        Row(
            name,
            batch,
            prompt,
            1e3 * timings[name].prefill_seconds,
            batch / timings[name].decode_seconds,
            device_bytes(contender.model) / 1e9,
            peak,
        )
        for name, contender in contenders.items()
    ]
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    peak = "-" if row.peak_gb is None else f"{row.peak_gb:.2f}"
    return (
        f"| {row.contender} | {row.batch} | {row.prompt} | {row.first_ms:.1f} | {row.tokens_s:.1f} | "
        f"{row.weights_gb:.2f} | {peak} |"
    )
