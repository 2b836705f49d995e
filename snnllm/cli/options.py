"""Options and helpers that several commands share.

What loads torch or transformers is imported in the functions that need it, here and in the commands:
help and simple errors come at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from snnllm.cli.checks import check_usable, checked_device
from snnllm.config import (
    PRESETS,
    WEIGHT_SCORES,
    Capacity,
    MaskScope,
    Operands,
    Score,
    SpikeConfig,
    ValueRange,
    WeightRange,
)
from snnllm.locate import spiking_folder
from snnllm.pipelines import Pipeline, check_makes, default_pipeline
from snnllm.pipelines.gptq_options import GptqOptions, check_budget
from snnllm.pipelines.omniquant_options import (
    Execution,
    OmniQuantOptions,
    Recipe,
    recipe_config,
)
from snnllm.step_budget import MAX_STEPS, SCORED_STEPS
from snnllm.views import View

if TYPE_CHECKING:
    from torch import Tensor

    from snnllm.pipelines.report import BlockReport
    from snnllm.sources import Source

CALIBRATION_WINDOW = 512
_PRESET, _TERNARY_PRESET = "W4A4T2", "TW1.4A16"

_OVERRIDES = {
    "ratio": "salient_ratio",
    "steps": "salient_steps",
    "range": "value_range",
    "score": "score",
    "mask_scope": "mask_scope",
    "attention": "attention",
    "weight_range": "weight_range",
    "group_size": "weight_group_size",
    "activation_clip": "activation_clip",
    "capacity": "capacity",
    "kv_steps": "kv_salient_steps",
    "mean_steps": "mean_steps",
    "embedding_bits": "embedding_bits",
}


def add_spike_options(parser: argparse.ArgumentParser) -> None:
    """Options that describe a `SpikeConfig` and its calibration."""
    parser.add_argument(
        "--pipeline",
        choices=[*map(str, Pipeline)],
        help="rotated: rotation inside the saliency groups and GPTQ; rtn: saliency masks and rounding, "
        "half the time, far from full precision; gptq: weights as ternary spike trains, linears that "
        "only add; omniquant: trained block by block (default: rotated; gptq for ternary weights, rtn "
        "for float activations)",
    )
    _add_training_options(parser)
    _add_gptq_options(parser)
    spike = parser.add_argument_group(
        "what is computed", "each of these options wins over what --preset and --recipe say"
    )
    spike.add_argument(
        "--preset",
        help="W<weight bits>A<spike bits>T<salient steps>, or TW<mean steps> for ternary weights, e.g. "
        f"{', '.join(PRESETS)} (default: {_PRESET}; pipeline gptq: {_TERNARY_PRESET})",
    )
    spike.add_argument("--ratio", type=float, help="fraction of channels that is salient, 0..1")
    spike.add_argument("--steps", type=int, help="time steps T of the salient channels")
    spike.add_argument(
        "--range",
        choices=[*map(str, ValueRange)],
        help="thresholds: of each group (split), one for all (shared), or of each in multiples of one "
        "unit (commensurate: one sum per linear)",
    )
    spike.add_argument("--score", choices=[*map(str, Score)], help="saliency score")
    spike.add_argument(
        "--mask-scope", choices=[*map(str, MaskScope)], help="a mask per linear or per input"
    )
    spike.add_argument(
        "--attention", choices=[*map(str, Operands)], help="encode Q, K, V or leave them float"
    )
    spike.add_argument(
        "--weight-range", choices=[*map(str, WeightRange)], help="min/max or clip search"
    )
    spike.add_argument(
        "--group-size", type=int, help="inputs that share a weight scale or threshold"
    )
    spike.add_argument(
        "--activation-clip", type=float, help="factor on the range of a token, 0..1: below 1 clips"
    )
    spike.add_argument(
        "--capacity",
        choices=[*map(str, Capacity)],
        help="largest spike count: steps (exact in every view) or power_of_two (as published, "
        "collapsed view only)",
    )
    spike.add_argument("--kv-steps", type=int, help="time steps of the salient channels of K, V")
    spike.add_argument(
        "--embedding-bits",
        type=int,
        choices=[8, 16],
        help="bits of the token embedding and the output head: 8, or 16 for float as they are",
    )
    spike.add_argument(
        "--modules-to-not-convert",
        nargs="+",
        metavar="NAME",
        help="linears that stay dense, by the end of their name, e.g. down_proj; the head always does",
    )
    _add_calibration_options(parser)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("what is learned (pipeline omniquant)")
    training.add_argument(
        "--recipe",
        choices=[*map(str, Recipe)],
        help="where these options and those of the configuration start: default, or paper (shared range, "
        "min/max weights, plain MSE, 20 epochs, as published); an option of its own, such as --range "
        "split, wins over the recipe",
    )
    training.add_argument(
        "--no-rotate",
        dest="rotate",
        action="store_false",
        default=None,
        help="keep the channels instead of rotating inside the saliency groups",
    )
    training.add_argument("--epochs", type=int, help="passes over the calibration windows")
    training.add_argument("--batch", type=int, help="windows of a training step")
    training.add_argument(
        "--second-loss", type=float, help="weight of a loss on the converted stream (default: 0)"
    )
    training.add_argument(
        "--execution",
        choices=[*map(str, Execution)],
        help="how a training step runs; graph: recorded once a block (CUDA only)",
    )


def _add_gptq_options(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_argument_group("how ternary weights are found (pipeline gptq)")
    weights.add_argument(
        "--mean-steps",
        type=float,
        help=f"time steps of a weight on average, 1..{SCORED_STEPS}, with two classes of columns up to their "
        "steps (default: as the preset says)",
    )
    weights.add_argument(
        "--column-score", choices=[*map(str, WEIGHT_SCORES)], help="ranks the weight columns"
    )
    weights.add_argument(
        "--salient-column-steps",
        type=int,
        help=f"two classes of columns, this many steps (2..{MAX_STEPS}) and one (default: any number up to "
        f"{SCORED_STEPS}, by the score)",
    )
    weights.add_argument(
        "--damping", type=float, help="of the Hessian, in units of its mean diagonal"
    )
    weights.add_argument(
        "--refinements", type=int, help="passes over all columns after the sweep (default: 2)"
    )
    weights.add_argument(
        "--no-compensate",
        dest="compensate",
        action="store_false",
        default=None,
        help="encode the original weights instead of weights fitted to the float model's outputs",
    )
    weights.add_argument("--ridge", type=float, help="weight of the original weights in that fit")


_GPTQ = {
    "column_score": "score",
    "salient_column_steps": "salient_steps",
    "damping": "damping",
    "refinements": "refinements",
    "compensate": "compensate",
    "ridge": "ridge",
}


def chosen_pipeline(args: argparse.Namespace, spike: SpikeConfig) -> Pipeline:
    """The pipeline that the user named, else the default of the configuration."""
    return default_pipeline(spike, {}) if args.pipeline is None else Pipeline(args.pipeline)


def pipeline_options(
    args: argparse.Namespace, pipeline: Pipeline, spike: SpikeConfig
) -> GptqOptions | OmniQuantOptions | None:
    """The options of the pipeline that was chosen; None for one that has none here.

    Raises:
        ValueError: Options or a configuration of another pipeline, or out of range, or a budget of steps
            that cannot be met.
    """
    check_makes(pipeline, spike)
    given = {
        field: getattr(args, option)
        for option, field in _GPTQ.items()
        if getattr(args, option) is not None
    }
    training = training_options(args, pipeline)
    if pipeline is Pipeline.GPTQ:
        options = GptqOptions(**given)
        check_budget(spike, options)
        return options
    if given:
        raise ValueError(
            f"{', '.join(given)}: this is for ternary weights, which the pipeline {pipeline} "
            "does not make."
        )
    return training


def training_options(args: argparse.Namespace, pipeline: Pipeline) -> OmniQuantOptions | None:
    """The options of the omniquant pipeline; None for another pipeline.

    Raises:
        ValueError: Options of training for a pipeline that does not train, or out of range.
    """
    given = {
        name: getattr(args, name)
        for name in ("rotate", "epochs", "batch", "second_loss", "execution")
        if getattr(args, name) is not None
    }
    if pipeline is not Pipeline.OMNIQUANT:
        if given or args.recipe is not None:
            names = ", ".join(given) or "recipe"
            raise ValueError(f"{names}: nothing is trained by the pipeline {pipeline}.")
        return None
    return OmniQuantOptions.recipe(args.recipe or Recipe.DEFAULT, **given)


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration",
        default="pydoc:train",
        help="text file, JSONL or dataset name; never the test text (default: %(default)s)",
    )
    data.add_argument("--nsamples", type=int, default=16, help="windows (default: %(default)s)")
    data.add_argument(
        "--seqlen",
        type=int,
        help=f"tokens a window (default: {CALIBRATION_WINDOW}, or the context of a smaller model)",
    )
    data.add_argument("--seed", type=int, default=0, help="offsets of the windows (default: 0)")


def spike_config(args: argparse.Namespace) -> SpikeConfig:
    """The configuration that the options describe."""
    given = {field: getattr(args, option) for option, field in _OVERRIDES.items()}
    if args.modules_to_not_convert is not None:
        given["modules_to_not_convert"] = ("lm_head", *args.modules_to_not_convert)
    given = {k: v for k, v in given.items() if v is not None}
    preset = args.preset
    if preset is None:
        ternary = args.pipeline == Pipeline.GPTQ or "mean_steps" in given
        preset = _TERNARY_PRESET if ternary else _PRESET
    return recipe_config(args.recipe or Recipe.DEFAULT, preset, **given)


def calibration_windows(args: argparse.Namespace, source: Source, text: str) -> Tensor:
    """The windows of the calibration text that the options describe."""
    from snnllm.data import random_windows, tokenize

    ids = tokenize(text, source.tokenizer())
    length = window_length(args.seqlen, CALIBRATION_WINDOW, source.config)
    return random_windows(ids, length, args.nsamples, args.seed)


def window_length(given: int | None, default: int, config: Any) -> int:
    """Tokens of a window: what the user gave, else the default or the context, if that is less."""
    if given is not None:
        return given
    from snnllm.evaluate import trained_context

    context = trained_context(config)
    return default if context is None else min(default, context)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a model."""
    parser.add_argument(
        "--view", choices=[*map(str, View)], help="view of a spiking model (default: collapsed)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")


def open_model(name: str, args: argparse.Namespace, only_spiking: bool = False) -> tuple[Any, Any]:
    """A spiking checkpoint, or a dense LLaMA, with its tokenizer.

    Raises:
        ValueError: The model is unusable, or a dense one where `only_spiking` or a view asks for spikes.
    """
    check_usable(args, name, spiking=True)
    folder = spiking_folder(name)
    if folder is None:  # told now: to open a dense model may take long
        if only_spiking:
            raise ValueError(f"{name} is dense; convert it first with `snnllm convert`.")
        if args.view is not None:
            raise ValueError(f"--view {args.view} needs a spiking checkpoint; {name} is dense.")
    device = checked_device(args.device)
    if folder is None:
        from snnllm.sources import dense_model, open_source

        source = open_source(name)
        model, tokenizer = dense_model(source), source.tokenizer()
    else:
        from transformers import AutoTokenizer

        from snnllm.execution import set_view
        from snnllm.modeling import load

        model = load(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if args.view is not None:
            set_view(model, args.view)
    return model.to(device).eval(), tokenizer


class ConversionBar(tqdm):
    """A progress bar over the blocks of a conversion; its methods are what `convert` calls."""

    def __init__(self, blocks: int, label: str = "convert", leave: bool = True) -> None:
        super().__init__(total=blocks, desc=label, unit="block", leave=leave)
        self._measured: tuple[str, ...] = ()

    def on_stage(self, stage: str) -> None:
        """Show what comes next, in a terminal."""
        self.set_postfix_str(", ".join([*self._measured, stage]), refresh=sys.stderr.isatty())

    def on_block(self, report: BlockReport) -> None:
        """Show what was measured of a finished block."""
        loss = () if report.loss_after is None else (f"loss {report.loss_after:.3g}",)
        self._measured = (*loss, f"SQNR {report.sqnr_db:.1f} dB")
        self.set_postfix_str(", ".join(self._measured), refresh=False)
        self.update()  # which shows both if it is time


def progress(label: str, total: int | None = None, unit: str = "window") -> Any:
    """A progress bar as an iterator wrapper."""

    def wrap(items: Iterable[Any]) -> Any:
        return tqdm(items, desc=label, total=total, unit=unit, leave=False)

    return wrap
