"""`snnllm convert`: dense LLaMA -> spiking checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from snnllm.card import write_card
from snnllm.cli.checks import check_at_least_one, check_calibration, check_usable, checked_device
from snnllm.cli.options import (
    ConversionBar,
    add_spike_options,
    calibration_windows,
    chosen_pipeline,
    pipeline_options,
    progress,
    spike_config,
    window_length,
)
from snnllm.durations import duration
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.step_budget import mean_steps_of
from snnllm.texts import check_text, load_text
from snnllm.work import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from snnllm.conversion import ConversionReport
    from snnllm.memory import Estimate
    from snnllm.sources import Source


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Convert a LLaMA (Hugging Face folder, .gguf file or hub id) block by block."
    )
    parser.add_argument("model", help="Hugging Face folder, .gguf file or hub id of a dense LLaMA")
    parser.add_argument("output", type=Path, help="checkpoint folder to make; must not exist")
    add_spike_options(parser)
    parser.add_argument("--device", default="cpu", help="where a block runs (default: cpu)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard OUTPUT.work, where an interrupted conversion would resume by itself",
    )
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="MIB",
        help="keep activations in a file beside the output when memory would exceed this",
    )
    parser.add_argument(
        "--eval", metavar="TEXT", help="measure perplexity before and after on this"
    )
    parser.add_argument("--limit", type=int, default=8, help="windows of --eval (default: 8)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print estimated time, memory and disk; write nothing",
    )
    parser.set_defaults(run=run, resumes=True)


def run(args: argparse.Namespace) -> int:
    """Convert, report, and write the model card."""
    spike = spike_config(args)
    pipeline = chosen_pipeline(args, spike)
    options = pipeline_options(args, pipeline, spike)
    _check(args)
    # Before the model, which takes seconds to open, and may have to be downloaded first.
    calibration, evaluation = _texts(args)
    check_usable(args, args.model)
    # Here, not above: they load torch and transformers, which takes seconds.
    from snnllm.checks import check_windows
    from snnllm.conversion import convert, write_report
    from snnllm.evaluate import token_perplexity
    from snnllm.memory import estimate, return_freed_memory
    from snnllm.modeling import load
    from snnllm.sources import dense_model, open_source

    return_freed_memory()
    device = checked_device(args.device)
    source = open_source(args.model)
    windows = calibration_windows(args, source, calibration)
    text_windows = None
    if evaluation is not None:  # before the conversion: bad text should not cost its time
        text_windows = _evaluation_windows(args, source, windows.shape[1], evaluation)
    blocks = source.config.num_hidden_layers
    epochs = options.epochs if isinstance(options, OmniQuantOptions) else 0
    count, length = windows.shape
    need = estimate(source, spike, count, length, pipeline, epochs, args.max_memory)
    if args.dry_run:
        check_windows(windows, source)
        print(f"{source.name}: {blocks} blocks, {spike.label}, {len(windows)} calibration windows")
        _print_estimate(need, args.output)
        return 0
    with ConversionBar(blocks) as bar:
        report = convert(
            source,
            args.output,
            spike,
            windows,
            pipeline=pipeline,
            seed=args.seed,
            device=device,
            options=options,
            restart=args.restart,
            max_memory_mib=args.max_memory,
            on_block=bar.on_block,
            on_stage=bar.on_stage,
        )
    measured = summary(report)
    measured["peak memory"] += f" (estimated {need.memory_mib:.0f} MiB)"
    if text_windows is not None:
        for label, model in (("dense", dense_model(source)), ("spiking", load(args.output))):
            result = token_perplexity(model.to(device), text_windows, progress=progress(label))
            where = f"{result.metric}, {args.eval}, {result.windows} windows"
            measured[f"perplexity, {label} ({where})"] = f"{result.perplexity:.2f}"
    write_report(report, args.output / "conversion.json")
    write_card(args.output, spike, measured)
    for name, value in measured.items():
        print(f"{name:<44} {value}")
    print(f"checkpoint: {args.output}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be told from the options and the names of the files."""
    check_at_least_one(args, "limit")
    check_calibration(args)
    if args.eval is not None:
        check_text(args.eval)
    check_output(args.output)


def _texts(args: argparse.Namespace) -> tuple[str, str | None]:
    """The texts of `--calibration` and, if it is given, `--eval`.

    Raises:
        ValueError: They are the same.
    """
    calibration = load_text(args.calibration)
    evaluation = None if args.eval is None else load_text(args.eval)
    if evaluation == calibration:
        raise ValueError(
            f"--eval {args.eval} is the text of --calibration, which the model has been fitted to; "
            "calibrate on another one, such as wikitext2:train."
        )
    return calibration, evaluation


def _evaluation_windows(args: argparse.Namespace, source: Source, length: int, text: str) -> Tensor:
    """The windows of `--eval`, as long as those of calibration or as the context allows."""
    from snnllm.data import token_windows, tokenize

    ids = tokenize(text, source.tokenizer())
    return token_windows(ids, window_length(None, length, source.config), args.limit)


def _print_estimate(need: Estimate, output: Path) -> None:
    print(f"estimated time    {duration(need.seconds)} on this CPU (within a factor of two)")
    print(f"estimated memory  {need.memory_mib:.0f} MiB")
    where = "in a file" if need.spills else "in memory"
    print(f"activations       {need.activations_mib:.0f} MiB, {where}")
    print(f"estimated disk    {need.disk_mib:.0f} MiB at {output}")


def summary(report: ConversionReport) -> dict[str, str]:
    """The figures of a conversion, by name."""
    sqnr = [b.sqnr_db for b in report.blocks]
    steps = [b.step_ms for b in report.blocks if b.step_ms is not None]
    trained = {"time of a training step": f"{sum(steps) / len(steps):.1f} ms"} if steps else {}
    rates = [b.spike_rate for b in report.blocks if b.spike_rate is not None]
    spiking = {"spike rate, mean of blocks": f"{sum(rates) / len(rates):.4f}"} if rates else {}
    columns = report.spike.weight_columns
    trains = {"time steps of a weight": f"{mean_steps_of(columns):.3f}"} if columns else {}
    device = report.blocks[-1].device_mib
    accelerator = {"peak memory of the device": f"{device:.0f} MiB"} if device else {}
    return {
        "spiking modules": str(report.spiking_modules),
        "weights on disk": f"{report.weight_bytes / 2**20:.1f} MiB",
        "bits per converted weight": f"{8 * report.linear_bytes / max(1, report.linear_weights):.3f}",
        **trains,
        "block SQNR, mean / worst": f"{sum(sqnr) / len(sqnr):.1f} / {min(sqnr):.1f} dB",
        **spiking,
        "conversion time, all runs": f"{report.seconds:.1f} s",
        "peak memory": f"{report.peak_mib:.0f} MiB",
        **trained,
        **accelerator,
    }
