"""Perplexity of the pipelines, tables of configurations side by side; those of the paper: `snnllm reproduce`.

    python benchmarks/accuracy.py MODEL --text wikitext2:test --calibration wikitext2:train

Every row converts MODEL anew, reloads the checkpoint and measures token perplexity in the collapsed
view. Calibration never sees the evaluation text.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from snnllm.config import SpikeConfig
from snnllm.modeling import LINEARS
from snnllm.paper.jobs import jobs_of
from snnllm.paper.lines import perplexity_lines
from snnllm.paper.measures import standard_measures
from snnllm.paper.recipes import Conversion, Measure, Row, Table, Training
from snnllm.paper.report import markdown
from snnllm.paper.runner import Reporter, Runner
from snnllm.paper.settings import Settings
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import PAPER_FIELDS, Execution, OmniQuantOptions
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.sources import open_source

SCORES = ("first_order", "abs", "gauss_newton", "max_abs", "random")
FLOAT = {"attention": "float"}
MINMAX = {"weight_range": "minmax"}
ROTATED = {"pipeline": "rotated"}
ATTENTION = {**ROTATED, "modules_to_not_convert": tuple(n.rpartition(".")[2] for n in LINEARS)}
EPOCHS = 10
"""Of the rows that train, unless the command line says otherwise."""


def omniquant(recipe: str = "default", fields: dict[str, Any] | None = None, **options: Any) -> Any:
    """A row of the pipeline `omniquant`: fields of the configuration, options of the training."""
    paper = PAPER_FIELDS if recipe == "paper" else {}
    return {
        **paper,
        **(fields or {}),
        "pipeline": "omniquant",
        "options": OmniQuantOptions.recipe(recipe, epochs=EPOCHS, **options),
    }


def ablation() -> list[tuple[str, str, dict[str, Any]]]:
    """{no saliency, five scores} x {shared, split} x T, the default recipe without rotation.

    The rotated basis chooses the residual channels by a score of its own, so it cannot compare them.
    With one step and one range for all, salient channels are encoded as the others: no saliency.
    """

    def channels(fields: dict[str, Any]) -> Any:
        return omniquant(fields=fields, rotate=False)

    rows = []
    for value_range in ("shared", "split"):
        one = {"value_range": value_range}
        rows.append((f"{value_range}, no saliency", "W4A4", channels(one)))
        for steps in (1, 2, 4) if value_range == "split" else (2, 4):
            preset = "W4A4T4" if steps == 4 else "W4A4T2"
            few = {"salient_steps": 1, "kv_salient_steps": 1} if steps == 1 else {}
            for score in SCORES:
                fields = {**one, **few, "score": score}
                name = f"{value_range}, T = {steps}, {score}"
                rows.append((name, preset, channels(fields)))
    return rows


ROWS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "issue": [
        ("10 % salient, split, attention float", "W4A4T2", FLOAT),
        ("10 % salient, shared, attention float", "W4A4T2", {**FLOAT, "value_range": "shared"}),
        ("no saliency, attention float", "W4A4", FLOAT),
        ("10 % salient, split, attention encoded", "W4A4T2", {}),
        ("10 % salient, shared, attention encoded", "W4A4T2", {"value_range": "shared"}),
        ("no saliency, attention encoded", "W4A4", {}),
        ("10 % salient, split, attention float, min/max", "W4A4T2", {**FLOAT, **MINMAX}),
        ("10 % salient, split, attention encoded, min/max", "W4A4T2", MINMAX),
    ],
    "presets": [
        ("T = 4 on 5 %", "W4A4T4", {}),
        ("float weights", "A4T2", {}),
        ("W4A8", "W4A8", {}),
        ("W2A8", "W2A8", {}),
        ("W8A8", "W8A8", {}),
        ("weight groups of 64", "W4A4T2", {"weight_group_size": 64}),
        ("one mask per shared input", "W4A4T2", {"mask_scope": "input"}),
    ],
    "weights": [
        (
            f"weights {weights}, {score}, attention {attention}",
            "W4A4T2",
            {
                "weight_range": weights,
                "score": score,
                "attention": attention,
            },
        )
        for weights in ("clip", "minmax")
        for score in ("first_order", "gauss_newton")
        for attention in ("float", "encoded")
    ],
    "rotated": [
        ("rotated, T = 2 on about 10 %", "W4A4T2", ROTATED),
        ("rotated, T = 4 on about 5 %", "W4A4T4", ROTATED),
        ("rotated, one group", "W4A4", ROTATED),
        ("rotated, float weights", "A4T2", ROTATED),
        ("rotated, W4A8", "W4A8", ROTATED),
        ("rotated, W2A8", "W2A8", ROTATED),
        ("rotated, W8A8", "W8A8", ROTATED),
    ],
    "ablation": [
        ("all parts", "W4A4T2", ROTATED),
        *(
            (f"without {label}", "W4A4T2", {**ROTATED, "options": RotatedOptions(**{part: False})})
            for part, label in (
                ("compensate", "the fit to the float model"),
                ("rotate", "folded rotations (down_proj, Q and K keep their Hadamard)"),
                ("offset", "input offsets"),
                ("key_offset", "the offset of K"),
                ("clip", "activation clip ratios"),
                ("segment_scales", "weight scales per saliency group"),
                ("query_groups", "channel groups for Q"),
            )
        ),
        ("attention operands float", "W4A4T2", {**ROTATED, **FLOAT}),
    ],
    "attention": [
        ("Q, K and V only", "W4A4T2", ATTENTION),
        (
            "Q, K and V only, without the offset of K",
            "W4A4T2",
            {**ATTENTION, "options": RotatedOptions(key_offset=False)},
        ),
    ],
    "ridge": [
        (f"ridge {ridge}", "W4A4T2", {**ROTATED, "options": RotatedOptions(ridge=ridge)})
        for ridge in (0.1, 0.3, 1.0, 3.0, 10.0)
    ],
    "omniquant": [
        ("rtn, split", "W4A4T2", {}),
        ("rtn, shared, min/max", "W4A4T2", {**MINMAX, "value_range": "shared"}),
        ("paper recipe, T = 2 on 10 %", "W4A4T2", omniquant("paper")),
        ("paper recipe, T = 4 on 5 %", "W4A4T4", omniquant("paper")),
        ("default, T = 2 on 10 %", "W4A4T2", omniquant()),
        ("default, T = 4 on 5 %", "W4A4T4", omniquant()),
        ("default, weights kept", "W4A4T2", omniquant(weight_rate=0.0)),
        ("default, not rotated", "W4A4T2", omniquant(rotate=False)),
        ("default, not rotated, weights kept", "W4A4T2", omniquant(rotate=False, weight_rate=0.0)),
        ("default, attention float", "W4A4T2", omniquant(fields=FLOAT)),
        ("default, float weights", "A4T2", omniquant()),
        ("rtn", "W2A8", {}),
        ("default", "W2A8", omniquant()),
        ("rtn", "W2A16", {}),
        ("default", "W2A16", omniquant()),
        ("default, weight groups of 64", "W2A16", omniquant(fields={"weight_group_size": 64})),
        ("default, weight groups of 128", "W2A16", omniquant(fields={"weight_group_size": 128})),
        ("rtn", "W8A8", {}),
        ("default", "W8A8", omniquant()),
        ("rtn, float weights, no saliency", "A4", {}),
        ("default, float weights, no saliency", "A4", omniquant()),
    ],
    "omniquant-ablation": ablation(),
    "omniquant-parts": [
        ("everything", "W4A4T2", omniquant()),
        *(
            (f"without {name}", "W4A4T2", omniquant(**{part: value}))
            for part, value, name in (
                ("scale_rate", 0.0, "learning the transformation"),
                ("scale_down", False, "the scale of up - down"),
                ("rotate", False, "rotation"),
                ("clip_rate", 0.0, "learning the clipping"),
                ("clip_activations", False, "activation clipping"),
                ("offset", False, "offsets"),
                ("segment_scales", False, "weight scales per saliency group"),
                ("query_groups", False, "channel groups for Q"),
                ("key_offset", False, "the offset of K"),
                ("weight_rate", 0.0, "learning the weights"),
                ("loss", "mse", "weights of the tokens in the loss"),
                ("decay", False, "decay of the learning rates"),
            )
        ),
        ("with the second loss", "W4A4T2", omniquant(second_loss=1.0)),
    ],
    "scores": [
        (f"score {score}", "W4A4T2", {"score": score})
        for score in ("first_order", "abs", "gauss_newton", "max_abs", "hessian", "random")
    ],
}


def table(name: str, training: Training, names: Sequence[str]) -> Table:
    """A table of `ROWS` for `snnllm.paper`: rows whose name contains one of the texts."""
    rows = []
    for label, preset, overrides in ROWS[name]:
        fields = dict(overrides)
        pipeline = Pipeline(fields.pop("pipeline", "rtn"))
        options = fields.pop("options", None)
        if isinstance(options, OmniQuantOptions):
            options = training.applied(options)
        conversion = Conversion(pipeline, SpikeConfig.preset(preset, **fields), options)
        rows.append(Row(label, preset, conversion))
    measures = (Measure.PERPLEXITY,)
    found = Table(name, name, tuple(rows), measures, perplexity_lines, {"convert s": ".1f"}, "")
    return found.chosen(False, names)


def main(argv: list[str] | None = None) -> int:
    """Run the tables and print them; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="dense LLaMA (%(default)s)")
    parser.add_argument("--text", default="pydoc:test", help="evaluation text (file or dataset)")
    parser.add_argument("--calibration", default="pydoc:train", help="calibration text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=12, help="evaluation windows, spread evenly")
    parser.add_argument("--batch", type=int, default=1, help="windows evaluated together")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--calibration-window", type=int, help="tokens; default as --window")
    parser.add_argument("--tables", nargs="+", choices=sorted(ROWS), default=["issue"])
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        help="only rows whose name or preset contains one of these texts",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of rows that train")
    parser.add_argument("--train-batch", type=int, help="windows of a training step")
    parser.add_argument("--execution", choices=[*Execution], help="how a training step runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="keep the rows here; a killed run continues")
    args = parser.parse_args(argv)

    source = open_source(args.model)
    training = Training(args.epochs, args.train_batch, args.execution)
    tables = [table(name, training, args.rows) for name in args.tables]
    dense = dataclasses.replace(tables[0], rows=(Row("float", "-", None),))
    settings = Settings(
        texts=(args.text,),
        calibration=args.calibration,
        calibration_windows=args.calibration_windows,
        calibration_window=args.calibration_window or args.window,
        window=args.window,
        limit=args.limit,
        batch_size=args.batch,
    )
    reporter = Reporter(
        lambda line: print(line, flush=True), lambda _: None, lambda *_: lambda _: None
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = args.output or Path(scratch)
        output.mkdir(parents=True, exist_ok=True)
        measures, device = standard_measures(settings, reporter.windows), torch.device(args.device)
        runner = Runner(source, settings, measures, output, device, reporter)
        try:
            done = runner.execute(jobs_of([dense, *tables]))
        finally:
            runner.close()
    print(f"{args.device}, torch {torch.__version__}, {settings}")
    for shown in tables:
        rows = (*dense.rows, *shown.rows)
        lines = shown.lines([(row, runner.record(row)) for row in rows])
        print("\n".join(["", *markdown(lines, shown.formats)]), flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
